package main

import (
	"bufio"
	"cmp"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// closeRecorder is a connection that can only be closed.
type closeRecorder struct {
	net.Conn
	closed bool
}

func (c *closeRecorder) Close() error { c.closed = true; return nil }

func (c *closeRecorder) RemoteAddr() net.Addr {
	return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}
}

func TestOldestUnauthenticatedConnectionIsReplaced(t *testing.T) {
	t.Parallel()
	p := newPreauthConns(4, &rejectedLog{log: slog.New(slog.DiscardHandler)})
	var sockets []*closeRecorder
	var conns []net.Conn
	add := func() {
		socket := &closeRecorder{}
		var conn net.Conn = socket
		if len(conns)%2 == 1 {
			conn = tls.Server(socket, nil)
		}
		sockets, conns = append(sockets, socket), append(conns, conn)
		p.add(conn)
	}
	wantClosed := func(want ...int) {
		t.Helper()
		var closed []int
		for i, socket := range sockets {
			if socket.closed {
				closed = append(closed, i)
			}
		}
		if !slices.Equal(closed, want) {
			t.Errorf("of %d connections these are closed: %v, want %v", len(sockets), closed, want)
		}
	}
	for range 4 {
		add()
	}
	wantClosed()
	add()
	wantClosed(0)
	p.release(conns[0]) // as net/http reports it closed
	p.release(conns[1]) // it has authenticated
	p.release(conns[3])
	p.release(conns[3])
	add()
	add()
	wantClosed(0)
	add()
	add()
	add()
	wantClosed(0, 2, 4, 5)
}

// [tls.Conn.Close] sends an alert first, and a client that does not read would hold up Serve for five
// seconds.
func TestReplacedTLSConnectionIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	cert, key, trusted := selfSigned(t)
	pair, err := tls.LoadX509KeyPair(cert, key)
	must(t, err)
	client, server := net.Pipe()
	defer client.Close()
	conn := tls.Server(server, &tls.Config{Certificates: []tls.Certificate{pair}, SessionTicketsDisabled: true})
	shaken := make(chan error, 1)
	go func() { shaken <- conn.Handshake() }()
	err = tls.Client(client, &tls.Config{RootCAs: trusted, ServerName: "127.0.0.1"}).Handshake()
	must(t, cmp.Or(err, <-shaken))
	p := newPreauthConns(1, &rejectedLog{log: slog.New(slog.DiscardHandler)})
	p.add(conn)
	go p.add(&closeRecorder{})
	if n, err := client.Read(make([]byte, 100)); n > 0 || err != io.EOF {
		t.Errorf("the client reads %d bytes, %v, want io.EOF", n, err)
	}
}

func TestConnectionsWithTheKeyOutliveACrowd(t *testing.T) {
	t.Parallel()
	cert, key, trusted := selfSigned(t)
	for _, encrypted := range []bool{false, true} {
		_, d := start(t, func(c *config) {
			c.preauthSlots = 2
			if encrypted {
				c.tlsCert, c.tlsKey = cert, key
			}
		})
		open := func() net.Conn {
			conn := wireDial(t, d)
			if encrypted {
				return tls.Client(conn, &tls.Config{RootCAs: trusted, ServerName: "127.0.0.1"})
			}
			return conn
		}
		healthy := func(conn net.Conn) {
			t.Helper()
			conn.SetDeadline(time.Now().Add(patience))
			io.WriteString(conn, d.head("GET /health")+"\r\n")
			answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || answer.StatusCode != 204 {
				t.Fatalf("TLS %v: %v, %v", encrypted, answer, err)
			}
		}
		var core, crowd []net.Conn
		for range 5 {
			core = append(core, open())
			healthy(core[len(core)-1])
		}
		for i := range 1000 {
			conn := wireDial(t, d)
			io.WriteString(conn, "\x16\x03") // the beginning of a TLS handshake, or of a bad request
			if crowd = append(crowd, conn); len(crowd) > 100 {
				crowd[0].Close()
				crowd = crowd[1:]
			}
			if i%200 == 0 {
				for _, conn := range core {
					healthy(conn)
				}
			}
		}
		for _, conn := range append(core, open()) {
			healthy(conn)
		}
	}
}

// A crowd that takes all slots does not keep the core out, and a flood of requests without the key is one
// line a second in the log.
func TestCrowdWithoutTheKeyNeitherHoldsUpTheCoreNorFillsTheLog(t *testing.T) {
	t.Parallel()
	const slots, crowd, refused = 10, 50, 300
	_, d := start(t, func(c *config) { c.preauthSlots = slots })
	begin := time.Now()
	for range crowd {
		io.WriteString(wireDial(t, d), "GET / HTTP/1.1\r\nHost: h\r\nX-") // and no more
	}
	fresh := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for range 3 {
		a, err := fresh.Do(d.request(t, "GET", "/health", nil))
		if err != nil || a.StatusCode != 204 {
			t.Fatalf("the core gets %v, %v", a, err)
		}
		a.Body.Close()
	}
	for range refused {
		if a, _ := sendRaw(t, d, "GET /service HTTP/1.1\r\nHost: h\r\n\r\n"); a.status != 401 {
			t.Fatalf("status %d", a.status)
		}
	}
	total, lines := 0, regexp.MustCompile(`msg="rejected connections" count=([0-9]+) last="127.0.0.1:`)
	waitFor(t, "all to be counted", func() bool {
		total = 0
		for _, line := range lines.FindAllStringSubmatch(d.log.String(), -1) {
			n, _ := strconv.Atoi(line[1])
			total += n
		}
		return total >= refused+crowd-slots
	})
	if total > refused+crowd {
		t.Errorf("%d rejections were counted", total)
	}
	if n := strings.Count(d.log.String(), "rejected"); n > 1+int(time.Since(begin)/time.Second) {
		t.Errorf("the log has %d lines of them after %v", n, time.Since(begin))
	}
	if strings.Contains(d.log.String(), "status=401") {
		t.Error("a request without the key has a line of its own")
	}
}

func TestFailedHandshakesAreCounted(t *testing.T) {
	t.Parallel()
	cert, key, _ := selfSigned(t)
	_, d := start(t, func(c *config) { c.tlsCert, c.tlsKey = cert, key })
	begin := time.Now()
	for range 50 {
		conn := wireDial(t, d)
		io.WriteString(conn, "no TLS\r\n\r\n")
		io.Copy(io.Discard, conn)
		conn.Close()
	}
	waitFor(t, "the handshakes to be counted", func() bool {
		return strings.Contains(d.log.String(), `msg="rejected connections" count=`)
	})
	names := slices.Repeat([]string{strings.Repeat("\x01", 250)}, 200) // the daemon's error quotes them
	if conn, err := tls.Dial("tcp", strings.TrimPrefix(d.url, "http://"),
		&tls.Config{InsecureSkipVerify: true, NextProtos: names}); err == nil {
		conn.Close()
		t.Error("the handshake has succeeded")
	}
	waitFor(t, "that one to be counted", func() bool {
		return strings.Contains(d.log.String(), "unsupported application protocols")
	})
	for line := range strings.Lines(d.log.String()) {
		if len(line) > 8*maxQuote {
			t.Errorf("the log has a line of %d bytes", len(line))
		}
	}
	if n := strings.Count(d.log.String(), "TLS handshake error"); n > 1+int(time.Since(begin)/time.Second) {
		t.Errorf("the log has %d lines of 51 handshakes after %v", n, time.Since(begin))
	}
}
