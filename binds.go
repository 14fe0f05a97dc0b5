package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"syscall"
)

const (
	recordDir = ".services"   // one record per service, named by its id
	markDir   = ".incomplete" // one mark per service that is being created or deleted, named by its id
	// markSource is the file that every mark is a hard link to: so a mark needs neither a free block nor an
	// inode, and a service can be deleted on a full disk.
	markSource = markDir + "/.mark"
	// draftSuffix and an id are the name of a record that is being written; no id has a dot.
	draftSuffix = ".tmp"
)

// serviceID guards every use of an id: the SDK puts names into URL paths unescaped, and a file name of ".."
// leads elsewhere. An id has no dot: names with a dot are the daemon's own. It has fewer than 64 characters:
// it is never a container's full id.
var serviceID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{1,62}$`)

// bindRoot is the directory that holds the bind directories, each named by its service's id, and the records
// and marks (see services). All access to it and below it is through [os.Root], or by one name in an open
// directory (see pathBelow), because customers write there. Every method that changes something, except
// create, has synced the change when it returns.
type bindRoot struct {
	root *os.Root
	path string   // absolute, as given, links not resolved; in labels and mounts too
	dir  *os.File // the root itself: its lock keeps other daemons out

	beforeSync func() // set by tests, which kill the daemon there
}

// openBinds opens the root, creating it if it is missing, and locks it against other daemons.
func openBinds(path string) (*bindRoot, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	b := &bindRoot{root: root, path: path}
	if err := b.prepare(); err != nil {
		b.close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}

// prepare locks the root, creates the directory of marks, and removes drafts of records.
func (b *bindRoot) prepare() (err error) {
	if b.dir, err = b.root.Open("."); err != nil {
		return err
	}
	err = syscall.Flock(int(b.dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == syscall.EWOULDBLOCK {
		return errors.New("in use by another daemon")
	}
	if err != nil {
		return err
	}
	// Other users of the host must not run setuid programs that a service has put there.
	if err := b.dir.Chmod(0o700); err != nil {
		return err
	}
	if err := b.root.MkdirAll(markDir, 0o700); err != nil {
		return err
	}
	if err := b.root.WriteFile(markSource, nil, 0o600); err != nil {
		return err
	}
	drafts, err := fs.Glob(b.root.FS(), recordDir+"/*"+draftSuffix)
	if err != nil {
		return err
	}
	for _, draft := range drafts {
		if err := b.root.Remove(draft); err != nil {
			return err
		}
	}
	return syncFilesystem(b.dir) // also what a killed daemon has changed and not synced
}

// close releases the root and its lock.
func (b *bindRoot) close() {
	b.root.Close()
	b.dir.Close() // may be nil: then Close returns an error
}

var errMoved = newAPIError(kindBindRootMoved, "the bind root was moved, or something was mounted over it, "+
	"since the daemon started: restart the daemon")

// check returns errMoved unless the root's path still leads to the directory that this daemon has open. The
// engine resolves the path at each start of a service: if the two differ, a customer could get another's
// data.
func (b *bindRoot) check() error {
	there, err := os.Stat(b.path)
	if errors.Is(err, fs.ErrNotExist) {
		return errMoved
	}
	if err != nil {
		return err
	}
	here, err := b.dir.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(here, there) {
		return errMoved
	}
	return nil
}

// errNoRecords is the error for a root that is new, or whose disk is not mounted: the daemon must not say
// then that a service does not exist.
var errNoRecords = newAPIError(kindUnavailable, "the bind root has no "+recordDir+": is its disk mounted?")

// checkRecords returns an error if the root was moved, or has no records.
func (b *bindRoot) checkRecords() error {
	if err := b.check(); err != nil {
		return err
	}
	there, err := b.has(recordDir)
	if err == nil && !there {
		err = errNoRecords
	}
	return err
}

// adopt creates the directory of records in a new root, see checkRoot.
func (b *bindRoot) adopt() error {
	return b.change(".", func() error {
		if err := ignore(b.root.Mkdir(recordDir, 0o700), fs.ErrExist); err != nil {
			return err
		}
		return b.change(recordDir, func() error { return nil }) // syncs the new directory itself
	})
}

// ignore returns nil if err is target, and else err.
func ignore(err, target error) error {
	if errors.Is(err, target) {
		return nil
	}
	return err
}

// has reports whether an entry exists.
func (b *bindRoot) has(name string) (bool, error) {
	_, err := b.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// change makes a change to the names in a directory, and syncs that. It opens the directory first: if no
// descriptor is left, it fails before the change.
func (b *bindRoot) change(dir string, change func() error) error {
	f, err := b.root.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := change(); err != nil {
		return err
	}
	if b.beforeSync != nil {
		b.beforeSync()
	}
	return f.Sync()
}

// exists reports whether a service exists: it has a record and no mark. If it has no record, exists returns
// the error of checkRecords, if any: the root may have been moved, or its disk may not be mounted.
func (b *bindRoot) exists(id string) (bool, error) {
	marked, err := b.marked(id)
	if err != nil || marked {
		return false, err
	}
	there, err := b.has(recordDir + "/" + id)
	if err == nil && !there {
		err = b.checkRecords()
	}
	return there, err
}

// marked reports whether a service is being created or deleted.
func (b *bindRoot) marked(id string) (bool, error) { return b.has(markDir + "/" + id) }

// mark marks a service as one that does not exist: everything that belongs to it must be removed.
func (b *bindRoot) mark(id string) error {
	return b.change(markDir, func() error {
		return ignore(b.root.Link(markSource, markDir+"/"+id), fs.ErrExist)
	})
}

// unmark removes the mark: from then on the service exists, if it has a record.
func (b *bindRoot) unmark(id string) error { return b.remove(markDir, id) }

// remove removes an entry of a directory, if it exists.
func (b *bindRoot) remove(dir, name string) error {
	return b.change(dir, func() error {
		return ignore(b.root.Remove(dir+"/"+name), fs.ErrNotExist)
	})
}

// record returns the record of a service, or nil if there is none.
func (b *bindRoot) record(id string) (*serviceRecord, error) {
	text, err := b.root.ReadFile(recordDir + "/" + id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	r := &serviceRecord{}
	err = json.Unmarshal(text, r)
	if err == nil && (r.Params.ID != id || r.latest().Params.ID != id || r.Revision == "") {
		err = errors.New("its id or its revision is wrong")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s/%s: %w", errBadRecord, recordDir, id, err)
	}
	return r, nil
}

// writeRecord replaces the record of a service. A crash leaves the old one or the new one.
func (b *bindRoot) writeRecord(id string, r serviceRecord) error {
	r.Params.BindContents = "" // it may hold a token, and is not needed again
	draft, name := recordDir+"/"+id+draftSuffix, recordDir+"/"+id
	return b.change(recordDir, func() error {
		err := b.writeSynced(draft, encodeJSON(r))
		if err == nil {
			err = b.root.Rename(draft, name)
		}
		if err != nil {
			b.root.Remove(draft) // or the next start does
		}
		return err
	})
}

// writeSynced writes a file, and syncs its contents.
func (b *bindRoot) writeSynced(name string, text []byte) error {
	f, err := b.root.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(text); err != nil {
		return err
	}
	return f.Sync()
}

// removeRecord removes the record of a service.
func (b *bindRoot) removeRecord(id string) error { return b.remove(recordDir, id) }

// existing returns the ids of all services, sorted: those with a record and without a mark.
func (b *bindRoot) existing() ([]string, error) {
	recorded, err := b.ids(recordDir)
	if err != nil {
		return nil, err
	}
	marked, err := b.ids(markDir)
	return slices.DeleteFunc(recorded, func(id string) bool { return slices.Contains(marked, id) }), err
}

// ids returns the names in a directory that are ids, sorted.
func (b *bindRoot) ids(dir string) (ids []string, err error) {
	entries, err := fs.ReadDir(b.root.FS(), dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, b.checkRecords()
	}
	for _, entry := range entries {
		if serviceID.MatchString(entry.Name()) {
			ids = append(ids, entry.Name())
		}
	}
	return ids, err
}

// usesImage reports whether any service's record has an image, now or from its next start on.
func (b *bindRoot) usesImage(imageID string) (bool, error) {
	ids, err := b.ids(recordDir)
	if err != nil {
		return false, err
	}
	for _, id := range ids {
		record, err := b.record(id)
		if err != nil || record != nil && (record.ImageID == imageID || record.latest().ImageID == imageID) {
			return true, err
		}
	}
	return false, nil
}

// checkUnused returns a 409 if the bind directory exists and is not empty: a create would mix the data of two
// services.
func (b *bindRoot) checkUnused(id string) error {
	info, err := b.root.Lstat(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var names []string
	if info.IsDir() {
		dir, err := b.root.Open(id)
		if err != nil {
			return err
		}
		defer dir.Close()
		if names, err = dir.Readdirnames(1); err != nil && err != io.EOF {
			return err
		}
	}
	if !info.IsDir() || len(names) > 0 {
		return newAPIError(kindDirectoryInUse, "the bind directory of %q exists and is not empty", id)
	}
	return nil
}

// create makes the service's bind directory, or takes an empty one. The caller syncs it, see services.fill,
// and closes it.
func (b *bindRoot) create(id string, o *owner) (*os.File, error) {
	if err := ignore(b.root.Mkdir(id, 0o700), fs.ErrExist); err != nil {
		return nil, err
	}
	dir, err := b.root.Open(id)
	if err != nil {
		return nil, err
	}
	err = dir.Chmod(0o755) // whatever the umask
	if err == nil && o != nil && os.Geteuid() == 0 {
		err = dir.Chown(o.uid, o.gid)
	}
	if err != nil {
		dir.Close()
		return nil, err
	}
	return dir, nil
}

// erase removes a service's bind directory with everything in it.
func (b *bindRoot) erase(ctx context.Context, id string) error {
	return b.change(".", func() error {
		for {
			err := b.root.Remove(id)
			if !isNotEmpty(err) {
				return ignore(err, fs.ErrNotExist)
			}
			// It is a directory, not a link. An ENOENT is an error here: somebody may have moved what is in it.
			if err := cmp.Or(ctx.Err(), removeContents(ctx, b.dir, id)); err != nil {
				return err
			}
		}
	})
}

// openLevel is an open directory on the path down into a tree.
type openLevel struct {
	dir   *os.File
	names []string // that were read from dir, and are not removed yet
	depth int      // below the top
}

// removeContents removes everything in a directory of dir. It follows no links. It needs no free block,
// because the disk may be full, and no descriptor per level, because a customer can nest 60,000 levels in
// seconds: it keeps some levels open and walks down again from those, in depth × log(depth) steps in all. It
// reads each open directory once: to read one of millions of names from its start takes longer each time,
// since ext4 keeps its empty blocks.
func removeContents(ctx context.Context, dir *os.File, name string) error {
	top, err := openBelow(dir, name)
	if err != nil {
		return err
	}
	way := []*openLevel{{dir: top}}
	defer func() {
		for _, l := range way {
			l.dir.Close()
		}
	}()
	for len(way) > 0 {
		at := way[len(way)-1]
		below, err := at.removeSome(ctx)
		switch {
		case err != nil:
			return err
		case below == "": // the nearest open level above removes it, or walks down to it again
			at.dir.Close()
			way = way[:len(way)-1]
		default: // a directory that is not empty
			next, err := openBelow(at.dir, below)
			if err != nil {
				return err
			}
			way = append(closeDistant(way, at.depth+1), &openLevel{dir: next, depth: at.depth + 1})
		}
	}
	return nil
}

// closeDistant closes levels far above depth and returns the others: the top, and each level that is a
// multiple of 2ⁿ and no more than 16·2ⁿ above depth. Those are 16 × log(depth) at most.
func closeDistant(way []*openLevel, depth int) []*openLevel {
	return slices.DeleteFunc(way, func(l *openLevel) bool {
		far := l.depth > 0 && depth-l.depth > 16*(l.depth&-l.depth) // the lowest bit of l.depth
		if far {
			l.dir.Close()
		}
		return far
	})
}

// removeSome removes the entries of a directory until it finds a directory that is not empty, whose name it
// returns. It returns "" when it has read all names.
func (l *openLevel) removeSome(ctx context.Context) (notEmpty string, err error) {
	for ; ; l.names = l.names[1:] {
		if len(l.names) == 0 {
			if l.names, err = l.dir.Readdirnames(128); len(l.names) == 0 {
				return "", ignore(err, io.EOF)
			}
		}
		err := cmp.Or(ctx.Err(), os.Remove(pathBelow(l.dir, l.names[0])))
		switch {
		case isNotEmpty(err):
			return l.names[0], nil
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return "", err
		}
	}
}

// isNotEmpty reports whether a directory was not removed because it is not empty: rmdir(2) has two errors for
// that.
func isNotEmpty(err error) bool {
	return errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST)
}

// openBelow opens a directory in dir. It does not follow a symbolic link, or wait for a FIFO.
func openBelow(dir *os.File, name string) (*os.File, error) {
	return os.OpenFile(pathBelow(dir, name), os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
}

// pathBelow returns a path to an entry of an open directory, whatever path leads to that directory by now. An
// [os.Root] per level would keep the joined path as its name: megabytes of it at 60,000 levels.
func pathBelow(dir *os.File, name string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name)
}

// syncFilesystem calls syncfs(2), which package syscall lacks on amd64: everything written to the file system
// of f becomes durable. It returns an error if any of that was lost since f was opened.
func syncFilesystem(f *os.File) error {
	number, known := map[string]uintptr{"amd64": 306, "arm64": 267}[runtime.GOARCH]
	if !known {
		return errors.ErrUnsupported
	}
	if _, _, errno := syscall.Syscall(number, f.Fd(), 0, 0); errno != 0 {
		return fmt.Errorf("cannot sync %s: %w", f.Name(), errno)
	}
	return nil
}
