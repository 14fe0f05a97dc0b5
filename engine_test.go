package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// engineReplace puts something else behind the engine's socket until restore is called.
// It counts the connections, each of which serve has for itself.
func engineReplace(t *testing.T, e *fakeEngine, serve func(net.Conn)) (connections *atomic.Int64,
	restore func()) {
	t.Helper()
	e.close()
	listener, err := net.Listen("unix", e.socket)
	must(t, err)
	connections = &atomic.Int64{}
	var open sync.Map
	var served sync.WaitGroup
	served.Go(func() { // ends with the listener
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			open.Store(conn, true)
			served.Go(func() {
				defer conn.Close()
				serve(conn)
			})
		}
	})
	return connections, func() {
		listener.Close()
		open.Range(func(conn, _ any) bool { conn.(net.Conn).Close(); return true })
		served.Wait()
		e.reopen()
	}
}

// engineSays answers each request with the text and leaves the connection open.
func engineSays(text string) func(net.Conn) {
	return func(conn net.Conn) {
		for reader := bufio.NewReader(conn); ; {
			r, err := http.ReadRequest(reader)
			if err != nil {
				return
			}
			io.Copy(io.Discard, r.Body)
			if header, _, _ := strings.Cut(text, "\r\n\r\n"); r.Method == http.MethodHead && header != "" {
				io.WriteString(conn, header+"\r\n\r\n")
			} else {
				io.WriteString(conn, text)
			}
		}
	}
}

func engineHangUp(text string) func(net.Conn) {
	return func(conn net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
			io.WriteString(conn, text)
		}
	}
}

// engineRequests is every use of the engine, with a service "web" that runs.
var engineRequests = []struct{ method, path, body string }{
	{"GET", "/health", ""},
	{"GET", "/service", ""},
	{"GET", "/service/web", ""},
	{"GET", "/service/web/stats", ""},
	{"GET", "/service/web/stats?stream=true", ""},
	{"POST", "/service", createBodyJSON("new", "")},
	{"POST", "/service/web/ctl", `{"op":"start"}`},
	{"POST", "/service/web/ctl", `{"op":"stop"}`},
	{"POST", "/service/web/ctl", `{"op":"restart"}`},
	{"POST", "/service/web/ctl", `{"op":"kill"}`},
	{"PUT", "/service/web", createBodyJSON("web", "")},
	{"DELETE", "/service/web", ""},
	{"POST", "/docker/image", wholeTar()},
}

// allAre sends all of them, and wants each to be refused with a status and a text.
func (d *daemon) allAre(t *testing.T, status int, text string) {
	t.Helper()
	for _, r := range engineRequests {
		if a := d.do(t, r.method, r.path, r.body).want(t, status,
			text); (a.header.Get("Retry-After") == "1") != (status == 503) {
			t.Errorf("%s %s: Retry-After is %q", r.method, r.path, a.header.Get("Retry-After"))
		}
	}
}

// An engine may come back as one of another version, which takes no other than its own.
func TestEngineThatIsGoneAndComesBack(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	for _, speaks := range []dialect{dialects["29"], {oldest: "1.40", newest: "1.40", parts: []string{"Engine"}},
		dialects["20.10"]} {
		e.close()
		d.allAre(t, 503, "the engine cannot be reached")
		d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204) // it needs the record alone
		d.do(t, "GET", "/service/web/params", "").want(t, 200, `"A=1"`)
		e.setDialect(speaks)
		e.reopen()
		d.do(t, "GET", "/service/web", "").want(t, 200)
		d.do(t, "GET", "/health", "").want(t, 204)
		if left := bindDirs(t, d.binds); len(left) != 1 || !slices.Equal(e.names(), []string{"web"}) {
			t.Errorf("left: %v %q", left, e.names())
		}
	}
}

// Of an engine that was exchanged while nobody asked for anything the daemon learns by the first answer.
func TestEngineThatIsExchangedBetweenTwoRequests(t *testing.T) {
	t.Parallel()
	for _, r := range engineRequests {
		e, d := startWithService(t)
		for _, other := range []string{"29", "20.10", "29"} {
			e.close()
			e.setDialect(dialects[other])
			e.reopen()
			if a := d.do(t, r.method, r.path, r.body); a.status >= 300 {
				a.want(t, 503)
			}
			d.do(t, "GET", "/service", "").want(t, 200)
		}
	}
}

func TestEngineThatRefusesTheVersionThatTheEnvironmentDemands(t *testing.T) {
	t.Setenv("DOCKER_API_VERSION", "1.41")
	e := newFakeEngine(t)
	e.setDialect(dialects["29"])
	d := startDaemon(t, e.host(), nil)
	d.allAre(t, 503, "client version 1.41 is too old")
	e.setDialect(dialects["20.10"])
	d.do(t, "GET", "/health", "").want(t, 204)
	d.do(t, "GET", "/service", "").want(t, 200)
}

// Nothing was begun when the engine does not say what it is: that is no 504.
func TestEngineThatDoesNotSayWhatItIs(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]struct {
		says   string
		status int
		text   string
	}{
		"is silent": {"", 503, "does not answer in time"},
		"says nothing": {"HTTP/1.1 200 OK\r\nApi-Version: 1.41\r\nContent-Length: 0\r\n\r\n", 502,
			"cannot be read"},
		"has no parts": {"HTTP/1.1 200 OK\r\nApi-Version: 1.41\r\nContent-Length: 2\r\n\r\n{}", 502,
			"not a Docker Engine"},
		"is out of order": {"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", 502, "500"},
	} {
		e, d := startWithRunning(t, engineImpatient)
		_, restore := engineReplace(t, e, engineSays(answer.says))
		d.do(t, "GET", "/health", "").want(t, answer.status, answer.text)
		restore()
		t.Log(name)
		d.do(t, "GET", "/health", "").want(t, 204)
	}
}

// A client that leaves a stream says nothing of the engine, which is not looked at again for that.
func TestClientThatLeavesCostsNoLookAtTheEngine(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, nil)
	ctx, leave := context.WithCancel(t.Context())
	answer, err := d.client.Do(d.request(t, "GET", "/service/web/logs?follow=true", nil).WithContext(ctx))
	must(t, err)
	defer answer.Body.Close()
	leave()
	waitFor(t, "the end of the request", func() bool { return strings.Contains(d.log.String(), "/logs\"") })
	other := dialects[*dialectName] // which a look would show, and nothing else
	other.parts = podman.parts
	e.setDialect(other)
	d.do(t, "GET", "/service", "").want(t, 200)
	d.do(t, "GET", "/health", "").want(t, 502)
}

// podman is version 4.3's API for clients of Docker.
var podman = dialect{oldest: "1.24", newest: "1.41",
	parts: []string{"Podman Engine", "Conmon", "OCI Runtime (runc)"}}

func TestWhatIsNoDockerEngineIsAskedNothing(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	e.close()
	before := len(e.calls())
	e.setDialect(podman)
	e.reopen()
	d.allAre(t, 502, `not a Docker Engine: its components are \"Podman Engine, Conmon, OCI Runtime (runc)\"`)
	e.wantAskedNothing(t, before)
	e.setDialect(dialects["20.10"])
	d.do(t, "GET", "/service/web", "").want(t, 200)
}

// Whatever is wrong with the engine, each request ends, in time and with few attempts,
// and the daemon works again as soon as the engine does.
func TestEngineThatDoesNotWork(t *testing.T) {
	t.Parallel()
	const header = "HTTP/1.1 200 OK\r\nApi-Version: 1.41\r\nContent-Type: application/json\r\n"
	for name, serve := range map[string]func(net.Conn){
		"takes connections and never answers": engineSays(""),
		"hangs up at once":                    func(net.Conn) {},
		"hangs up when asked":                 engineHangUp(""),
		"sends no HTTP":                       engineHangUp("SSH-2.0-OpenSSH_9.2p1\r\n"),
		"sends part of a header":              engineHangUp("HTTP/1.1 200 O"),
		"sends half a body and hangs up":      engineHangUp(header + "Content-Length: 1000\r\n\r\n{\"Id\":\"a"),
		"sends half a body and waits":         engineSays(header + "Content-Length: 1000\r\n\r\n{\"Id\":\"a"),
		"sends half a list and hangs up": engineHangUp(header +
			"Transfer-Encoding: chunked\r\n\r\n6\r\n[{\"Id\"\r\n"),
		"sends broken chunks": engineHangUp(header + "Transfer-Encoding: chunked\r\n\r\nzz\r\n{}"),
		"answers with a page": engineSays("HTTP/1.1 200 OK\r\n" +
			"Content-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>"),
		"answers with another JSON type": engineSays(header + "Content-Length: 8\r\n\r\n{\"Id\":5}"),
		"answers with a string":          engineSays(header + "Content-Length: 3\r\n\r\n\"x\""),
		"answers 500 with nothing": engineSays("HTTP/1.1 500 Internal Server Error\r\n" +
			"Content-Length: 0\r\n\r\n"),
		"redirects": engineSays("HTTP/1.1 302 Found\r\n" +
			"Location: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, d := startWithRunning(t, engineImpatient)
			before := state(t, e, d)
			connections, restore := engineReplace(t, e, serve)
			var answers sync.WaitGroup
			for _, r := range engineRequests {
				answers.Go(func() {
					a := d.do(t, r.method, r.path, r.body)
					if !slices.Contains([]int{502, 503, 504}, a.status) {
						t.Errorf("%s %s: %d %s", r.method, r.path, a.status, a.body)
					}
					errorsClean(t, d, a.body)
				})
			}
			answers.Wait()
			if n := connections.Load(); n > int64(10*len(engineRequests)) {
				t.Errorf("%d connections to the engine for %d requests", n, len(engineRequests))
			}
			restore()
			d.do(t, "GET", "/health", "").want(t, 204)
			d.do(t, "GET", "/service/web/stats", "").want(t, 200, `"/web"`)
			d.do(t, "POST", "/service", createBodyJSON("new", "")).want(t, 201)
			d.do(t, "DELETE", "/service/new", "").want(t, 204)
			wantState(t, e, d, before)
		})
	}
}

func TestEngineThatRestartsUnderAStream(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, nil)
	for range 3 {
		stream := statsOpen(t, d, "web")
		stream.next(t)
		e.close()
		for range stream.lines { // until it ends
		}
		d.do(t, "GET", "/service/web/stats", "").want(t, 503)
		before := len(e.calls())
		e.reopen()
		d.do(t, "GET", "/service/web/stats", "").want(t, 200)
		if calls := e.calls()[before:]; len(calls) > 4 {
			t.Errorf("the engine was asked %q", calls)
		}
	}
}

// An engine on another machine, that wants to know who asks.
func TestEngineOverTLS(t *testing.T) {
	e := newFakeEngine(t)
	e.addImage("img:1")
	listener := httptest.NewUnstartedServer(e)
	listener.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	listener.StartTLS()
	t.Cleanup(listener.Close)
	dir := t.TempDir()
	certificate := listener.TLS.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	must(t, err)
	for name, block := range map[string]*pem.Block{
		"ca.pem":   {Type: "CERTIFICATE", Bytes: certificate.Certificate[0]},
		"cert.pem": {Type: "CERTIFICATE", Bytes: certificate.Certificate[0]},
		"key.pem":  {Type: "PRIVATE KEY", Bytes: key},
	} {
		must(t, os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600))
	}
	t.Setenv("DOCKER_CERT_PATH", dir)
	t.Setenv("DOCKER_TLS_VERIFY", "1")
	d := startDaemon(t, "tcp://"+listener.Listener.Addr().String(), nil)
	d.do(t, "POST", "/docker/image", wholeTar()).want(t, 201)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	d.do(t, "GET", "/service/web", "").want(t, 200, `"/web"`)
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
	d.do(t, "POST", "/service/web/stdin", "typed\n").want(t, 204)
	d.do(t, "GET", "/service/web/stats", "").want(t, 200)
}

func TestEngineOverTCPBelowAnyPath(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addImage("img:1")
	listener := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.URL.Path = strings.TrimPrefix(r.URL.Path, "/base")
		e.ServeHTTP(w, r)
	}))
	t.Cleanup(listener.Close)
	for _, path := range []string{"", "/", "/base", "/base/"} {
		d := startDaemon(t, "tcp://"+listener.Listener.Addr().String()+path, nil)
		d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
		d.do(t, "GET", "/service/web", "").want(t, 200, `"/web"`)
		d.do(t, "DELETE", "/service/web", "").want(t, 204)
	}
}

// What breaks the connection is an engine that cannot be reached, and not one that has failed.
func TestEngineThatSpeaksNoHTTPIsUnavailable(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", "HTTP/1.1 200 OK\r\nContent-Le"} {
		e, d := start(t, nil)
		_, restore := engineReplace(t, e, engineHangUp(text))
		a := d.do(t, "GET", "/health", "").want(t, 503, "unavailable", "cannot be reached")
		if a.header.Get("Retry-After") != "1" {
			t.Errorf("after %q, the header is %v", text, a.header)
		}
		restore()
		d.do(t, "GET", "/health", "").want(t, 204)
	}
}
