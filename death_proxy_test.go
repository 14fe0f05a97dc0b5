//go:build integration

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/docker/docker/client"
)

// deathProxy stands between the daemon and the engine.
type deathProxy struct {
	socket    string
	transport *http.Transport // to the engine
	hook      atomic.Pointer[deathHook]
}

// A deathHook takes the place of the round trip to the engine, for all calls but pings.
type deathHook func(r *http.Request) (*http.Response, error)

func newDeathProxy(t *testing.T, socket string, engine *client.Client) *deathProxy {
	t.Helper()
	dial := engine.Dialer()
	p := &deathProxy{socket: socket, transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) }}}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	quiet := log.New(io.Discard, "", 0)
	server := &http.Server{ErrorLog: quiet, Handler: &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", "engine" },
		Transport:     p,
		FlushInterval: -1,
		ErrorLog:      quiet,
		// The daemon must not see an answer that the engine did not give.
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}}
	go server.Serve(listener) // ends with Close
	t.Cleanup(func() { server.Close(); p.transport.CloseIdleConnections() })
	return p
}

func (p *deathProxy) setHook(hook deathHook) {
	if hook == nil {
		p.hook.Store(nil)
		return
	}
	p.hook.Store(&hook)
}

func (p *deathProxy) RoundTrip(r *http.Request) (*http.Response, error) {
	if hook := p.hook.Load(); hook != nil && !strings.HasSuffix(r.URL.Path, "/_ping") {
		return (*hook)(r)
	}
	return p.transport.RoundTrip(r)
}

var errDeathPlanned = errors.New("the daemon is dead")

// dieAt kills daemon at one of its next engine calls. It returns what a late call waits
// for; that waits until the engine has answered.
func (p *deathProxy) dieAt(daemon *deathDaemon, d plannedDeath) (release func()) {
	var calls atomic.Int64
	held := func() {}
	p.setHook(func(r *http.Request) (*http.Response, error) {
		if calls.Add(1)-1 != int64(d.call) {
			return p.transport.RoundTrip(r)
		}
		switch d.side {
		case dieBefore:
			daemon.kill()
		case dieAfter:
			p.finish(r)
			daemon.kill()
		case dieDuring:
			sent := func(httptrace.WroteRequestInfo) { time.AfterFunc(d.delay, daemon.kill) }
			trace := httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{WroteRequest: sent})
			p.finish(r.WithContext(trace)) // the engine sees the connection close when the daemon dies
			<-daemon.exited
		case dieLate:
			if r.Body != nil {
				body, _ := io.ReadAll(r.Body)
				r.Body = io.NopCloser(bytes.NewReader(body))
			}
			r = r.WithContext(context.Background())
			held = func() { p.finish(r) }
			daemon.kill()
		}
		return nil, errDeathPlanned
	})
	return func() { held() }
}

// finish carries out a call whose answer nobody will see.
func (p *deathProxy) finish(r *http.Request) {
	if answer, err := p.transport.RoundTrip(r); err == nil {
		io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
	}
}
