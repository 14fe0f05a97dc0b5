package main

import (
	"cmp"
	"container/list"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
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

// strangers is a listener. Its connections have not shown the core key, at first, and for such there
// are places for half of the files that the daemon may open; the rest is for the core, the engine and
// the disk. Who comes when all are taken waits until one is left, or somebody has had his for
// strangerTime: the oldest of all or, for an address that has a quarter of the places, of its own. So
// nobody holds up the core for long, which shows its key as soon as it can.
type strangers struct {
	net.Listener
	places int
	left   chan struct{} // gets one when somebody leaves
	mu     sync.Mutex
	order  *list.List // of stranger, the oldest first
	at     map[net.Conn]*list.Element
	from   map[netip.Addr]int
}

type stranger struct {
	conn net.Conn
	came time.Time
	from netip.Addr
}

func newStrangers(listener net.Listener, places int) *strangers {
	return &strangers{Listener: listener, places: places, left: make(chan struct{}, 1), order: list.New(),
		at: map[net.Conn]*list.Element{}, from: map[netip.Addr]int{}}
}

// strangerPlaces returns how many strangers there may be: Go has raised the limit to its hard one.
func strangerPlaces() int {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return maxStrangers
	}
	return int(min(files.Cur/2, maxStrangers))
}

// Accept returns the next connection when it has a place.
func (s *strangers) Accept() (net.Conn, error) {
	conn, err := s.Listener.Accept()
	if err != nil {
		return nil, err
	}
	newest := stranger{conn, time.Now(), origin(conn)}
	for wait := s.admit(newest); wait > 0; wait = s.admit(newest) {
		select {
		case <-s.left:
		case <-time.After(wait):
		}
	}
	return conn, nil
}

// admit gives a place to a connection, or returns how long it has to wait for one at most.
func (s *strangers) admit(newest stranger) (wait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.at) >= s.places {
		oldest := s.order.Front()
		for s.from[newest.from] > s.places/4 && oldest.Value.(stranger).from != newest.from {
			oldest = oldest.Next()
		}
		leaving := oldest.Value.(stranger)
		if wait = strangerTime - time.Since(leaving.came); wait > 0 {
			return wait
		}
		s.remove(leaving.conn)
		leaving.conn.Close()
	}
	newest.came = time.Now()
	s.at[newest.conn] = s.order.PushBack(newest)
	s.from[newest.from]++
	return 0
}

// forget lets go of a connection that has shown the key, or is closed.
func (s *strangers) forget(conn net.Conn) {
	if encrypted, ok := conn.(*tls.Conn); ok {
		conn = encrypted.NetConn()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.at[conn] != nil {
		s.remove(conn)
	}
}

// remove removes a connection. The caller holds the mutex.
func (s *strangers) remove(conn net.Conn) {
	gone := s.order.Remove(s.at[conn]).(stranger)
	delete(s.at, conn)
	if s.from[gone.from]--; s.from[gone.from] == 0 {
		delete(s.from, gone.from)
	}
	select {
	case s.left <- struct{}{}:
	default: // who waits has yet to look
	}
}

// origin returns the address that a connection comes from: of IPv6 the network, which is what one
// customer of a provider has.
func origin(conn net.Conn) netip.Addr {
	end, _ := netip.ParseAddrPort(conn.RemoteAddr().String())
	addr := end.Addr().Unmap()
	if network, err := addr.Prefix(64); err == nil && addr.Is6() {
		return network.Addr()
	}
	return addr
}

// knownKey is the key, in a request's context, of the function to call when its connection has shown
// the core key.
type knownKey struct{}

// refusals counts what is refused for want of the key, so that strangers cannot fill the disk: it
// logs a line a second at most.
type refusals struct {
	mu     sync.Mutex
	counts map[string]int // by reason; nil while no line is due
}

func (r *refusals) add(log *slog.Logger, reason string, last any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.counts == nil {
		r.counts = map[string]int{}
		time.AfterFunc(time.Second, func() {
			r.mu.Lock()
			counts := r.counts
			r.counts = nil
			r.mu.Unlock()
			args := []any{}
			for _, reason := range slices.Sorted(maps.Keys(counts)) {
				args = append(args, reason, counts[reason])
			}
			log.Warn("refused", append(args, "one", last)...)
		})
	}
	r.counts[reason]++
}

// serverLog takes net/http's own log: of each TLS handshake that fails it has a line.
type serverLog struct{ s *server }

func (l serverLog) Write(line []byte) (int, error) {
	if text := strings.TrimSpace(string(line)); strings.HasPrefix(text, "http: TLS handshake error") {
		l.s.refusals.add(l.s.log, "tls", text)
	} else {
		l.s.log.Warn(text)
	}
	return len(line), nil
}
