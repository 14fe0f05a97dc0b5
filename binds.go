package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
)

// gonePrefix begins the name of a bind directory on its way out. All others in the root
// are named by their service's id.
const gonePrefix = ".gone."

// bindRoot is the directory that holds the bind directories. Every access to it and to
// what is below goes through os.Root, because customers write there.
type bindRoot struct {
	root *os.Root
	path string // absolute, without links: as the engine sees it
	lock *os.File
}

// owner is a numeric user and group.
type owner struct{ uid, gid int }

// openBinds opens the root, makes it if it is missing, and keeps other daemons out of it.
func openBinds(path string) (*bindRoot, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, err
	}
	path, err := filepath.EvalSymlinks(path)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	lock, err := root.Open(".")
	if err == nil && syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		err = errors.New("in use by another daemon")
	}
	if err == nil {
		// Other users of the host must not reach the setuid programs that a service may have.
		err = lock.Chmod(0o700)
	}
	b := &bindRoot{root, path, lock}
	if err != nil {
		b.close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}

func (b *bindRoot) close() {
	b.root.Close()
	b.lock.Close()
}

// make makes the service's bind directory. It refuses to take one that is there: it would
// mix the data of two services.
func (b *bindRoot) make(id string, o *owner) error {
	err := b.root.Mkdir(id, 0o755)
	if errors.Is(err, fs.ErrExist) { // settling has removed an empty one
		return failure(http.StatusConflict, "the bind directory of %q exists and is not empty", id)
	}
	if err == nil {
		err = b.root.Chmod(id, 0o755) // whatever the umask
	}
	if err != nil || o == nil || os.Geteuid() != 0 {
		return err
	}
	return b.root.Lchown(id, o.uid, o.gid)
}

// removeEmpty removes the service's bind directory if it is an empty directory.
func (b *bindRoot) removeEmpty(id string) error {
	if info, err := b.root.Lstat(id); err != nil || !info.IsDir() {
		return nil
	}
	if err := b.root.Remove(id); !errors.Is(err, syscall.ENOTEMPTY) {
		return err
	}
	return nil
}

// remove removes the service's bind directory with all that is in it. Settling has removed
// what was left beside it.
func (b *bindRoot) remove(ctx context.Context, id string) error {
	if err := b.root.Rename(id, gonePrefix+id); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return b.removeGone(ctx, id)
}

// removeGone removes what is on its way out with all that is in it, and follows no link
// out of it.
func (b *bindRoot) removeGone(ctx context.Context, id string) error {
	name := gonePrefix + id
	if err := b.root.Remove(name); err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	tree, err := b.root.OpenRoot(name)
	if err != nil {
		return err
	}
	defer tree.Close()
	if err := empty(ctx, tree, "."); err != nil {
		return err
	}
	return b.root.Remove(name)
}

// empty removes all that is in tree at dir. A customer nests 60,000 directories in seconds,
// and os.Root.RemoveAll holds a descriptor for each: here one that is not empty is lifted
// out of dir instead, to be met there later, under a name that nobody can have foreseen.
// From the top it cannot be, nor out of a subvolume.
func empty(ctx context.Context, tree *os.Root, dir string) error {
	for {
		entries, err := readSome(tree, dir)
		if len(entries) == 0 || err != nil {
			return err
		}
		for _, entry := range entries {
			name := path.Join(dir, entry.Name())
			err := cmp.Or(ctx.Err(), tree.Remove(name))
			if errors.Is(err, syscall.ENOTEMPTY) && dir != "." {
				err = tree.Rename(name, path.Join(path.Dir(dir), rand.Text()))
			}
			if errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EXDEV) && strings.Count(dir, "/") < maxDepth {
				err = empty(ctx, tree, name) // the next round removes it
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
}

// readSome returns the first entries of a directory: none, and no error, if it is empty.
func readSome(tree *os.Root, dir string) ([]fs.DirEntry, error) {
	f, err := tree.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY, 0) // a pipe in its place would block
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries, err := f.ReadDir(1024)
	if err == io.EOF {
		err = nil
	}
	return entries, err
}

// serviceLocks has a lock for each service, for those who ask in their order. Different
// services never wait for each other.
type serviceLocks struct {
	mu   sync.Mutex
	byID map[string]*serviceLock // those that somebody has or waits for
}

type serviceLock struct {
	free  chan struct{} // holds one value while nobody has the lock
	users int
}

func newServiceLocks() serviceLocks { return serviceLocks{byID: map[string]*serviceLock{}} }

// lock waits until the service's lock is free. With a ctx that has ended it only tries.
func (l *serviceLocks) lock(ctx context.Context, id string) (unlock func(), err error) {
	l.mu.Lock()
	k := l.byID[id]
	if k == nil {
		k = &serviceLock{free: make(chan struct{}, 1)}
		k.free <- struct{}{}
		l.byID[id] = k
	}
	k.users++
	l.mu.Unlock()
	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if k.users--; k.users == 0 {
			delete(l.byID, id)
		}
	}
	select {
	case <-k.free:
	default:
		select {
		case <-k.free:
		case <-ctx.Done():
			leave()
			return nil, failure(http.StatusGatewayTimeout, "another operation on this service is still under way")
		}
	}
	return func() { k.free <- struct{}{}; leave() }, nil
}
