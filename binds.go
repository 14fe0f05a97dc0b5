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

// Beside the bind directories, which are named by their service's id, stand only these.
const (
	stagingPrefix = ".new."  // contents of a create that has not committed
	gonePrefix    = ".gone." // a bind directory on its way out
)

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

// makeDir makes a bind directory. It refuses to take one that is there: it would mix the
// data of two services.
func (b *bindRoot) makeDir(name string, o *owner) error {
	if err := b.root.Mkdir(name, 0o755); err != nil {
		return err
	}
	if err := b.root.Chmod(name, 0o755); err != nil || o == nil || os.Geteuid() != 0 { // whatever the umask
		return err
	}
	return b.root.Lchown(name, o.uid, o.gid)
}

// fill makes the service's empty bind directory anew with what unpack puts there.
// [os.Root.Rename] replaces no directory, so there is a moment without one: the
// service's container is not committed yet.
func (b *bindRoot) fill(id string, o *owner, unpack func(*os.Root) error) error {
	if err := b.makeDir(stagingPrefix+id, o); err != nil {
		return err
	}
	staging, err := b.root.OpenRoot(stagingPrefix + id)
	if err != nil {
		return err
	}
	defer staging.Close()
	if err := unpack(staging); err != nil {
		return err
	}
	if err := b.root.Remove(id); err != nil {
		return err
	}
	return b.root.Rename(stagingPrefix+id, id)
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
	return b.removeLeftovers(ctx, id)
}

// removeLeftovers removes what an earlier operation left beside the bind directory.
func (b *bindRoot) removeLeftovers(ctx context.Context, id string) error {
	for _, name := range []string{stagingPrefix + id, gonePrefix + id} {
		if err := b.removeTree(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// removeTree removes name with all that is in it, and follows no link out of it.
func (b *bindRoot) removeTree(ctx context.Context, name string) error {
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
	f, err := tree.Open(dir)
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
