package main

import (
	"container/list"
	"context"
	"crypto/tls"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"
)

// maxPreauthSlots caps the unauthenticated connections, whatever RLIMIT_NOFILE is. Each can hold
// 81 KB of memory until [http.Server.ReadHeaderTimeout] closes it.
const maxPreauthSlots = 4096

// preauthConns limits the connections that have not authenticated, like MaxStartups in
// sshd_config(5). A connection takes a slot when it is accepted, and frees it when a request on it
// carries the core key or when it is closed. When all slots are taken, sshd refuses new connections;
// here a new one replaces the oldest, or clients that reconnect at once would keep the core out.
type preauthConns struct {
	slots    int
	rejected *rejectedLog
	mu       sync.Mutex
	queue    list.List                  // of net.Conn, the oldest in front
	elements map[net.Conn]*list.Element // of queue
}

func newPreauthConns(slots int, rejected *rejectedLog) *preauthConns {
	return &preauthConns{slots: slots, rejected: rejected, elements: map[net.Conn]*list.Element{}}
}

// defaultPreauthSlots returns half of RLIMIT_NOFILE, whose soft limit the Go runtime raises to the hard
// one. The other half is for the core, the engine and the disk.
func defaultPreauthSlots() int {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return maxPreauthSlots
	}
	return int(min(files.Cur/2, maxPreauthSlots))
}

// authenticatedKey is the context key for the func() that markAuthenticated calls.
type authenticatedKey struct{}

// markAuthenticated frees the slot of the connection that r came on.
func markAuthenticated(r *http.Request) {
	r.Context().Value(authenticatedKey{}).(func())()
}

// configure makes srv report its connections to p, and failed TLS handshakes to p.rejected. With
// TLS, both hooks get the same *tls.Conn.
func (p *preauthConns) configure(srv *http.Server) {
	srv.ErrorLog = stdlog.New(p.rejected, "", 0)
	srv.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		return context.WithValue(ctx, authenticatedKey{}, func() { p.release(conn) })
	}
	srv.ConnState = func(conn net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew: // Serve waits for this call before it accepts the next connection
			p.add(conn)
		case http.StateClosed:
			p.release(conn)
		}
	}
}

// add gives conn a slot, if necessary the one of the oldest connection.
func (p *preauthConns) add(conn net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.queue.Len() >= p.slots {
		oldest := p.queue.Front().Value.(net.Conn)
		p.remove(oldest)
		closeSocket(oldest)
		p.rejected.add(oldest.RemoteAddr().String() + ": closed to make room for a newer connection")
	}
	p.elements[conn] = p.queue.PushBack(conn)
}

// release frees conn's slot, if it still has one.
func (p *preauthConns) release(conn net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.remove(conn)
}

// remove frees conn's slot, if it has one. The caller holds p.mu.
func (p *preauthConns) remove(conn net.Conn) {
	if element, ok := p.elements[conn]; ok {
		p.queue.Remove(element)
		delete(p.elements, conn)
	}
}

// closeSocket never blocks. [tls.Conn.Close] waits up to five seconds for its alert to be sent.
func closeSocket(conn net.Conn) {
	if encrypted, ok := conn.(*tls.Conn); ok {
		conn = encrypted.NetConn()
	}
	conn.Close()
}

// rejectedLog logs rejected requests, TLS handshakes and connections, so that they cannot fill the
// disk: at most one line a second, with their number and the last of them.
type rejectedLog struct {
	log   *slog.Logger
	mu    sync.Mutex
	count int // since the last line
	last  string
}

// add counts a rejection. The first one starts a one-second timer; flush then reports all of them.
func (l *rejectedLog) add(what string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.count == 0 {
		time.AfterFunc(time.Second, l.flush)
	}
	l.count++
	l.last = truncate(what) // the text of a TLS error can quote the client, at any length
}

func (l *rejectedLog) flush() {
	l.mu.Lock()
	count, last := l.count, l.last
	l.count = 0
	l.mu.Unlock() // a write to a full pipe blocks
	l.log.Warn("rejected connections", "count", count, "last", last)
}

// Write takes a line of [http.Server.ErrorLog]. A failed TLS handshake is a rejection, counted a
// second time if add closed the connection. Other lines, such as a panic's, are logged one by one.
func (l *rejectedLog) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	if strings.HasPrefix(text, "http: TLS handshake error") {
		l.add(text)
	} else {
		l.log.Warn(text)
	}
	return len(line), nil
}
