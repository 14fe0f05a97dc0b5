package main

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	coreKeyHeader = "X-Duxcore-Corekey" // X-Duxcore-CoreKey in canonical form
	minKeyBytes   = 16
	maxKeyBytes   = 4096
)

// coreKey is the SHA-256 sum of what the header must say, the core key in base64: of one
// length whatever the key's, and no secret to guess at when it shows in a core dump.
type coreKey [sha256.Size]byte

// authorizes reports whether r carries the core key, once. It decodes nothing: a key has
// only one strict base64 form. It compares sums because [subtle.ConstantTimeCompare]
// returns early on unequal lengths.
func (k coreKey) authorizes(r *http.Request) bool {
	values := r.Header[coreKeyHeader]
	if len(values) != 1 {
		return false
	}
	sum := sha256.Sum256([]byte(values[0]))
	return subtle.ConstantTimeCompare(sum[:], k[:]) == 1
}

// keyDraft matches the names of files in which a core key is made.
var keyDraft = regexp.MustCompile(`^\.corekey-[0-9]+$`)

// loadCoreKey reads the core key from path, or creates one there if nothing is there.
// A key that is short, long, unreadable or no regular file is an error: a daemon
// without a good key would be open to everyone.
func loadCoreKey(path string, log *slog.Logger) (coreKey, error) {
	dir := filepath.Dir(path)
	entries, tidyErr := os.ReadDir(dir)
	for _, entry := range entries {
		if name := entry.Name(); keyDraft.MatchString(name) && name != filepath.Base(path) {
			// Of a daemon that died. It may be the key itself, by a second name.
			tidyErr = cmp.Or(tidyErr, os.Remove(filepath.Join(dir, name)))
		}
	}
	if tidyErr != nil && !errors.Is(tidyErr, fs.ErrNotExist) {
		log.Warn("cannot remove what an earlier start may have left beside the core key", "err", tidyErr)
	}
	info, err := os.Stat(path)
	created := errors.Is(err, fs.ErrNotExist)
	if created {
		if err := createCoreKey(path); err != nil {
			return coreKey{}, fmt.Errorf("cannot create the core key: %w", err)
		}
		log.Info("core key created", "path", path)
		info, err = os.Stat(path)
	}
	var key []byte
	if err == nil && info.Mode().IsRegular() && info.Size() <= maxKeyBytes {
		key, err = os.ReadFile(path)
	}
	if err == nil && len(key) < minKeyBytes { // or not read
		err = fmt.Errorf("the core key %s must be a file of %d to %d bytes", path, minKeyBytes, maxKeyBytes)
	}
	// A start that died may have made it, and not synced it.
	syncErr := cmp.Or(syncFile(path), syncFile(dir))
	if created {
		err = cmp.Or(err, syncErr)
	}
	if err != nil {
		return coreKey{}, err
	}
	if syncErr != nil { // on an image that cannot be written, say
		log.Warn("cannot make sure that the core key survives a power cut", "err", syncErr)
	}
	if info.Mode().Perm()&0o077 != 0 {
		log.Warn("others can read the core key", "path", path, "mode", info.Mode().Perm())
	}
	return sha256.Sum256([]byte(base64.StdEncoding.EncodeToString(key))), nil
}

// syncFile makes a file durable, or the names in a directory.
func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// createCoreKey writes a random key beside path and links it into place, so that a
// crash leaves either no key or a whole one, and a key that is there is never replaced.
func createCoreKey(path string) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".corekey-*") // a keyDraft; mode 0600
	if err != nil {
		return err
	}
	defer f.Close()
	key := make([]byte, 32)
	rand.Read(key)
	_, err = f.Write(key)
	if err = cmp.Or(err, f.Sync()); err == nil {
		err = os.Link(f.Name(), path)
	}
	return cmp.Or(err, os.Remove(f.Name()))
}

const (
	// maxStrangers is how many connections without the key there may be, whatever the limit of open
	// files: each can cost 81 KB, for the ten seconds that net/http gives it for a header.
	maxStrangers = 4096
	// strangerTime is for a TLS handshake and a header, when others wait for a stranger's place.
	strangerTime = 250 * time.Millisecond
)

// strangers is a listener that bounds how many connections there are which have not shown the core
// key. Such a connection has a place, until it shows the key or is closed. There are places for
// half of the files that the daemon may open; the rest is for the core, the engine and the disk.
//
// When all places are taken, Accept waits, and with it whoever comes later, until somebody leaves or the
// oldest has had his for strangerTime: he is closed then. So that no address takes the places of the
// others, one that has more than a quarter of them gets only those of its own oldest, and is not waited
// for: what comes from it meanwhile is closed at once. But behind a proxy the core has the same address
// as all strangers: what comes from where the core came from last is waited for.
type strangers struct {
	net.Listener
	places int
	left   chan struct{} // gets one when somebody leaves
	mu     sync.Mutex
	here   []stranger // the oldest first
	core   netip.Addr // where the last one to show the key came from
}

// stranger is one connection that has not shown the key.
type stranger struct {
	conn net.Conn
	from netip.Addr
	came time.Time
}

func newStrangers(listener net.Listener, places int) *strangers {
	return &strangers{Listener: listener, places: places, left: make(chan struct{}, 1)}
}

// strangerPlaces returns how many strangers there may be: Go has raised the limit to its hard one.
func strangerPlaces() int {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return maxStrangers
	}
	return int(min(files.Cur/2, maxStrangers))
}

// Accept returns the next connection that gets a place, when it has it.
func (s *strangers) Accept() (net.Conn, error) {
	for {
		conn, err := s.Listener.Accept()
		if err != nil {
			return nil, err
		}
		wait := s.admit(conn)
		for ; wait > 0; wait = s.admit(conn) {
			select {
			case <-s.left:
			case <-time.After(wait):
			}
		}
		if wait == 0 {
			return conn, nil
		}
		conn.Close()
	}
}

// admit gives a place to a connection, or returns how long it has to wait for one at most: a
// negative time if it gets none.
func (s *strangers) admit(conn net.Conn) (wait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	newest := stranger{conn, origin(conn), time.Now()}
	if len(s.here) >= s.places {
		isOwn := func(other stranger) bool { return other.from == newest.from }
		oldest, own := 0, 0
		for _, other := range s.here {
			if isOwn(other) {
				own++
			}
		}
		isCrowd := own > s.places/4
		if isCrowd {
			oldest = slices.IndexFunc(s.here, isOwn)
		}
		wait = strangerTime - time.Since(s.here[oldest].came)
		if wait > 0 && isCrowd && newest.from != s.core {
			return -1
		}
		if wait > 0 {
			return wait
		}
		s.here[oldest].conn.Close()
		s.here = slices.Delete(s.here, oldest, oldest+1)
	}
	s.here = append(s.here, newest)
	return 0
}

// know lets go of a connection that has shown the key.
func (s *strangers) know(conn net.Conn) {
	s.mu.Lock()
	s.core = origin(conn)
	s.mu.Unlock()
	s.forget(conn)
}

// forget lets go of a connection that has shown the key, or is closed.
func (s *strangers) forget(conn net.Conn) {
	if encrypted, ok := conn.(*tls.Conn); ok {
		conn = encrypted.NetConn()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.here = slices.DeleteFunc(s.here, func(other stranger) bool { return other.conn == conn })
	select {
	case s.left <- struct{}{}:
	default: // who waits has yet to look
	}
}

// origin returns the address that a connection comes from: of IPv6 the network, which is what one
// customer of a provider has.
func origin(conn net.Conn) netip.Addr {
	end, _ := netip.ParseAddrPort(conn.RemoteAddr().String())
	addr := end.Addr().Unmap().WithZone("")
	if network, err := addr.Prefix(64); err == nil && addr.Is6() {
		return network.Addr()
	}
	return addr
}

// knownKey is the key, in a request's context, of the function to call when its connection has shown
// the core key.
type knownKey struct{}

// refusals counts what is refused for want of the key, and logs a line a second at most: strangers
// cannot fill the disk.
type refusals struct {
	mu    sync.Mutex
	count int // since the last line
	last  string
}

// add counts a refusal. The first starts a second, at whose end all that came in it are one line.
func (r *refusals) add(log *slog.Logger, what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count++
	r.last = quote(what) // of a TLS handshake it can be as long as a stranger likes
	if r.count == 1 {
		time.AfterFunc(time.Second, func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			log.Warn("refused", "count", r.count, "last", r.last)
			r.count = 0
		})
	}
}

// serverLog takes net/http's own log: of each TLS handshake that fails it has a line.
type serverLog struct{ s *server }

// Write takes one line, as log.Logger calls it. A stranger can make as many failed handshakes as he likes,
// so those are counted with what is refused.
func (l serverLog) Write(line []byte) (int, error) {
	if text := strings.TrimSpace(string(line)); strings.HasPrefix(text, "http: TLS handshake error") {
		l.s.refusals.add(l.s.log, text)
	} else {
		l.s.log.Warn(text)
	}
	return len(line), nil
}
