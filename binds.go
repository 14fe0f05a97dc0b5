package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
)

// goneDir holds, by their services' ids, the bind directories that are on their way out. On a
// full disk the root, with many entries, may have no room for one name more. This directory
// has: it is almost empty, and a directory keeps the block that it was made with.
const goneDir = ".gone"

// bindRoot is the directory that holds the bind directories, each named by its service's id.
// Every access to it and to what is below goes through os.Root, because customers write there.
type bindRoot struct {
	root *os.Root
	path string   // absolute, as it was given: so it stands in the containers' labels and mounts
	dir  *os.File // the root: its lock keeps other daemons out, its sync makes its entries durable
	gone *os.File // goneDir, for its sync
}

// owner is a numeric user and group.
type owner struct{ uid, gid int }

// openBinds opens the root, makes it if it is missing, and keeps other daemons out of it.
func openBinds(path string) (*bindRoot, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(path, goneDir), 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	b := &bindRoot{root: root, path: path}
	if b.dir, err = root.Open("."); err == nil {
		err = syscall.Flock(int(b.dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	}
	if err == syscall.EWOULDBLOCK {
		err = errors.New("in use by another daemon")
	}
	if err == nil {
		// Other users of the host must not reach the setuid programs that a service may have.
		err = b.dir.Chmod(0o700)
	}
	if err == nil {
		b.gone, err = root.Open(goneDir)
	}
	if err == nil { // what was made just now, or by a start that died, has to survive a power cut
		err = syncFilesystem(b.dir)
	}
	if err != nil {
		b.close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}

// close gives the root up, and with it the lock that keeps a second daemon out.
func (b *bindRoot) close() {
	b.root.Close()
	b.dir.Close()  // which a nil *os.File can be asked for
	b.gone.Close() // too
}

// errMoved ends a daemon that starts. If the engine was down then, each request that meets it has this
// for its error, a 500, until somebody starts the daemon with the other path.
var errMoved = errors.New("the bind directories belong to services that know them by another path")

// checkMoved returns an error if another path leads to this root too: by a link, say, that was left
// where it was before.
func (b *bindRoot) checkMoved(path string) error {
	there, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	here, hereErr := b.dir.Stat()
	if err = cmp.Or(err, hereErr); err == nil && os.SameFile(here, there) {
		err = fmt.Errorf("%w: start it with -binds %s", errMoved, path)
	}
	return err
}

// has reports whether the root has an entry. No other error than ENOENT says that it has not.
func (b *bindRoot) has(name string) (bool, error) {
	_, err := b.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// allGone returns the ids of the services that have a directory on its way out.
func (b *bindRoot) allGone() (ids []string, err error) {
	entries, err := fs.ReadDir(b.root.FS(), goneDir)
	for _, entry := range entries {
		if serviceID.MatchString(entry.Name()) {
			ids = append(ids, entry.Name())
		}
	}
	return ids, err
}

// free returns a conflict if the service has a bind directory with something in it: to use that
// would mix the data of two services.
func (b *bindRoot) free(id string) error {
	info, err := b.root.Lstat(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	isDir, names := err == nil && info.IsDir(), []string(nil)
	if isDir {
		names, err = readSome(b.root, id)
	}
	if err == nil && (!isDir || len(names) > 0) {
		err = failure(fullDirectory, "the bind directory of %q exists and is not empty", id)
	}
	return err
}

// ensure makes the service's bind directory, or takes one that is there. The caller closes it.
func (b *bindRoot) ensure(id string, o *owner) (*os.File, error) {
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

// discard puts the service's bind directory among those on their way out, for good: that survives
// a power cut, and no late call of a dead daemon undoes it. A service without one gets an empty
// file there, for which a full disk has room.
func (b *bindRoot) discard(id string) error {
	err := b.root.Rename(id, goneDir+"/"+id)
	if errors.Is(err, fs.ErrNotExist) {
		err = b.root.WriteFile(goneDir+"/"+id, nil, 0o600)
	}
	return cmp.Or(err, b.gone.Sync(), b.dir.Sync())
}

// erase removes what discard has put away, with all that is in it, for good. A daemon that died may
// not have synced either directory.
func (b *bindRoot) erase(ctx context.Context, id string) error {
	name := goneDir + "/" + id
	err := b.root.Remove(name)
	if isNotEmpty(err) { // and so a directory, not a link that somebody has put there
		var dir *os.Root
		if dir, err = openBelow(b.root, name); err == nil {
			err = empty(ctx, dir)
		}
		if err == nil {
			err = b.root.Remove(name)
		}
	}
	return cmp.Or(err, b.gone.Sync(), b.dir.Sync())
}

// A level is a directory on the way down into a tree, kept open.
type level struct {
	dir   *os.Root
	depth int // below the top
}

// empty removes all that is in a directory, and closes it. It follows no link, and needs neither
// a free block, for the disk may be full, nor a descriptor for each directory on its way down: a
// customer nests 60,000 in seconds. What lies between two levels that it has kept it goes down
// again, which takes depth × log(depth) steps on the whole.
func empty(ctx context.Context, top *os.Root) error {
	way := []level{{top, 0}}
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
			way = append(thin(way, at.depth+1), level{dir, at.depth + 1})
		}
	}
	return nil
}

// thin closes levels that are far above depth, and returns the others: the top, and of each 2ⁿ levels one
// that is no more than 16·2ⁿ above. Those are 16 × log(depth) at most.
func thin(way []level, depth int) []level {
	return slices.DeleteFunc(way, func(l level) bool {
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

// serviceLocks is one first-come, first-served lock per service. Each operation that changes a
// service holds its lock from before it looks what is there until it answers, but for kill, which
// must not wait behind the stop that it is to cut short. A read takes it only to wait for a start that
// is between its two renames. Different services never wait for each other. The same locks serve
// writers to a container's stdin, by its id, and imports, by their entry in the journal.
type serviceLocks struct {
	mu sync.Mutex // guards queues, and is never held while anybody waits
	// queues holds, by id, a channel for each who holds the lock or waits for it, in the order in which they
	// came. The first holds the lock. When he leaves, the next one's channel is closed.
	queues map[string][]chan struct{}
}

func newServiceLocks() serviceLocks { return serviceLocks{queues: map[string][]chan struct{}{}} }

// lock waits for the service's lock until ctx ends. With a ctx that has ended it only tries.
func (l *serviceLocks) lock(ctx context.Context, id string) (unlock func(), err error) {
	turn := make(chan struct{})
	l.mu.Lock()
	first := len(l.queues[id]) == 0
	l.queues[id] = append(l.queues[id], turn)
	l.mu.Unlock()
	leave := func() { l.leave(id, turn) }
	if first {
		return leave, nil
	}
	select {
	case <-turn:
		return leave, nil
	case <-ctx.Done():
		leave()
		return nil, errUnderWay
	}
}

// leave gives up a place in a queue. If that was the first, the next has the lock.
func (l *serviceLocks) leave(id string, turn chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := slices.Index(l.queues[id], turn)
	l.queues[id] = slices.Delete(l.queues[id], at, at+1)
	if len(l.queues[id]) == 0 {
		delete(l.queues, id)
	} else if at == 0 {
		close(l.queues[id][0])
	}
}
