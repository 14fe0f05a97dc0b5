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
	"runtime"
	"slices"
	"syscall"
)

const (
	recordDir = ".services"   // one record per service, named by its id
	markDir   = ".incomplete" // one mark per service that is being created or deleted, named by its id
	// markSource is what every mark is a hard link to: then a mark needs neither a free block nor an inode, and
	// a service can be deleted on a full disk.
	markSource = markDir + "/.mark"
)

// bindRoot is the directory that holds the bind directories, each named by its service's id, and the records
// and marks (see services). All access to it and to what is below goes through os.Root, because customers
// write there. Every method that changes something has synced the change when it returns.
type bindRoot struct {
	root *os.Root
	path string   // absolute, as it was given, links not resolved: so it appears in labels and mounts
	dir  *os.File // the root itself: its lock keeps other daemons out

	beforeSync func() // set by tests: a daemon may be killed after any change
}

// owner is a numeric user and group.
type owner struct{ uid, gid int }

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

// prepare locks the root, creates the directory of marks, and removes records that were never finished.
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
	// Other users of the host must not reach the setuid programs that a service may have.
	if err := b.dir.Chmod(0o700); err != nil {
		return err
	}
	if err := b.root.MkdirAll(markDir, 0o700); err != nil {
		return err
	}
	mark, err := b.root.OpenFile(markSource, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	mark.Close()
	drafts, err := fs.Glob(b.root.FS(), recordDir+"/.*")
	if err != nil {
		return err
	}
	for _, draft := range drafts {
		if err := b.root.Remove(draft); err != nil {
			return err
		}
	}
	return syncFilesystem(b.dir) // also what an earlier daemon created and did not sync
}

// close releases the root and its lock.
func (b *bindRoot) close() {
	b.root.Close()
	b.dir.Close() // a nil *os.File may be closed
}

var errMoved = newAPIError(kindBindRootMoved, "the bind root was moved, or something was mounted over it, "+
	"since the daemon started: restart the daemon")

// check returns errMoved unless the root's path still leads to the directory that this daemon has open. The
// engine resolves the path at each start of a service: if the two differ, one customer could read another's
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

// adopt creates the directory of records, without which checkRoot lets nothing be done.
func (b *bindRoot) adopt() error {
	if err := b.root.Mkdir(recordDir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return cmp.Or(b.sync(recordDir), b.sync("."))
}

// has reports whether the root has an entry.
func (b *bindRoot) has(name string) (bool, error) {
	_, err := b.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// hasAny reports whether the root has at least one of these entries.
func (b *bindRoot) hasAny(names ...string) (bool, error) {
	for _, name := range names {
		if there, err := b.has(name); err != nil || there {
			return there, err
		}
	}
	return false, nil
}

// sync makes the names in a directory durable.
func (b *bindRoot) sync(dir string) error {
	if b.beforeSync != nil {
		b.beforeSync()
	}
	f, err := b.root.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// exists reports whether there is a service: it has a record, and no mark. In a root that was moved to
// another disk no file is left, so it is errMoved that the caller gets, and not that the service is gone.
func (b *bindRoot) exists(id string) (bool, error) {
	marked, err := b.marked(id)
	if err != nil || marked {
		return false, err
	}
	there, err := b.has(recordDir + "/" + id)
	if err == nil && !there {
		err = b.check()
	}
	return there, err
}

// marked reports whether a service is being created or deleted.
func (b *bindRoot) marked(id string) (bool, error) { return b.has(markDir + "/" + id) }

// mark says that there is no such service, and that what belongs to it has to be removed.
func (b *bindRoot) mark(id string) error {
	err := b.root.Link(markSource, markDir+"/"+id)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return b.sync(markDir)
}

// unmark removes the mark. After that the service exists if it has a record.
func (b *bindRoot) unmark(id string) error { return b.remove(markDir, id) }

// remove removes an entry of a directory, if it is there.
func (b *bindRoot) remove(dir, name string) error {
	err := b.root.Remove(dir + "/" + name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return b.sync(dir)
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
	if err == nil && (r.Params.ID != id || r.Revision == "") {
		err = errors.New("it is not this service's")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s/%s: %w", errBadRecord, recordDir, id, err)
	}
	return r, nil
}

// errBadRecord is wrapped by the error for a record that cannot be read: only an administrator can help.
var errBadRecord = errors.New("the record is damaged")

// writeRecord replaces the record of a service: a crash leaves the old one or the new one.
func (b *bindRoot) writeRecord(id string, r serviceRecord) error {
	r.Params.BindContents = "" // it may hold a token, and is not needed again
	draft, name := recordDir+"/."+id, recordDir+"/"+id
	err := b.writeSynced(draft, encodeJSON(r))
	if err == nil {
		err = b.root.Rename(draft, name)
	}
	if err != nil {
		return cmp.Or(err, b.root.Remove(draft))
	}
	return b.sync(recordDir)
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

// ids returns the entries of a directory that are services' ids, sorted.
func (b *bindRoot) ids(dir string) (ids []string, err error) {
	entries, err := fs.ReadDir(b.root.FS(), dir)
	if errors.Is(err, fs.ErrNotExist) { // not adopted yet, or moved away
		return nil, b.check()
	}
	for _, entry := range entries {
		if serviceID.MatchString(entry.Name()) {
			ids = append(ids, entry.Name())
		}
	}
	return ids, err
}

// usesImage reports whether the record of a service needs an image, now or from its next start on.
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

// checkUnused returns a conflict if the service has a bind directory with something in it: using that
// would mix the data of two services.
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
		names, err = readSome(b.root, id)
	}
	if err == nil && (!info.IsDir() || len(names) > 0) {
		err = newAPIError(kindDirectoryInUse, "the bind directory of %q exists and is not empty", id)
	}
	return err
}

// create makes the service's bind directory, or uses an empty one that exists. The caller closes it.
func (b *bindRoot) create(id string, o *owner) (*os.File, error) {
	if err := b.root.Mkdir(id, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
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

// erase removes a service's bind directory with all that is in it.
func (b *bindRoot) erase(ctx context.Context, id string) error {
	err := b.root.Remove(id)
	if isNotEmpty(err) { // so it is a directory, and not a link
		err = b.eraseTree(ctx, id)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return b.sync(".")
}

// eraseTree removes a directory that is not empty.
func (b *bindRoot) eraseTree(ctx context.Context, id string) error {
	dir, err := openBelow(b.root, id)
	if err != nil {
		return err
	}
	if err := removeContents(ctx, dir); err != nil {
		return err
	}
	return b.root.Remove(id)
}

// A level is a directory on the way down into a tree, kept open.
type openLevel struct {
	dir   *os.Root
	depth int // below the top
}

// empty removes all that is in a directory, and closes it. It follows no link, and needs neither
// a free block, for the disk may be full, nor a descriptor for each directory on its way down: a
// customer nests 60,000 in seconds. What lies between two levels that it has kept it goes down
// again, which takes depth × log(depth) steps on the whole.
func removeContents(ctx context.Context, top *os.Root) error {
	way := []openLevel{{top, 0}}
	defer func() {
		for _, l := range way {
			l.dir.Close()
		}
	}()
	for len(way) > 0 {
		at := way[len(way)-1]
		below, err := removeSome(ctx, at.dir)
		switch {
		case err != nil:
			return err
		case below == "": // this one is empty: the level above removes it, or finds more of the way to it
			at.dir.Close()
			way = way[:len(way)-1]
		default: // a directory that is not empty
			dir, err := openBelow(at.dir, below)
			if err != nil {
				return err
			}
			way = append(closeDistant(way, at.depth+1), openLevel{dir, at.depth + 1})
		}
	}
	return nil
}

// thin closes levels that are far above depth, and returns the others: the top, and of each 2ⁿ levels one
// that is no more than 16·2ⁿ above. Those are 16 × log(depth) at most.
func closeDistant(way []openLevel, depth int) []openLevel {
	return slices.DeleteFunc(way, func(l openLevel) bool {
		far := l.depth > 0 && depth-l.depth > 16*(l.depth&-l.depth) // the lowest bit of l.depth
		if far {
			l.dir.Close()
		}
		return far
	})
}

// removeSome removes what is in a directory until it meets a directory that is not empty, whose
// name it returns. It returns no name when nothing is left.
func removeSome(ctx context.Context, dir *os.Root) (notEmpty string, err error) {
	for {
		names, err := readSome(dir, ".")
		if err != nil || len(names) == 0 {
			return "", err
		}
		for _, name := range names {
			err := cmp.Or(ctx.Err(), dir.Remove(name))
			switch {
			case isNotEmpty(err):
				return name, nil
			case err != nil && !errors.Is(err, fs.ErrNotExist):
				return "", err
			}
		}
	}
}

// isNotEmpty reports whether a directory was not removed because of what is in it: POSIX has two
// errors for that.
func isNotEmpty(err error) bool {
	return errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST)
}

// openBelow opens a directory in dir, and nothing else: a pipe in its place would block. It goes
// by way of /proc because an os.Root keeps its name, which would be longer with each level: with
// 60,000 of them, that would be megabytes to copy at each.
func openBelow(dir *os.Root, name string) (*os.Root, error) {
	f, err := dir.OpenFile(name, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
}

// readSome returns the first names in a directory: none, and no error, if it is empty.
func readSome(root *os.Root, name string) ([]string, error) {
	dir, err := root.OpenFile(name, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(128)
	if err == io.EOF {
		err = nil
	}
	return names, err
}

// syncFilesystem makes all durable that was written to the file system that f is on. It returns
// an error if any of that was lost since f was opened: syncfs(2), which package syscall lacks on
// amd64. Where its number is not known here all file systems are synced, without such errors.
func syncFilesystem(f *os.File) error {
	number, known := map[string]uintptr{"amd64": 306, "arm64": 267}[runtime.GOARCH]
	if !known {
		syscall.Sync()
		return nil
	}
	if _, _, errno := syscall.Syscall(number, f.Fd(), 0, 0); errno != 0 {
		return fmt.Errorf("cannot sync %s: %w", f.Name(), errno)
	}
	return nil
}
