package main

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/docker/docker/pkg/stdcopy"
)

// consoleStart starts a daemon with a running service, and the fields in extra.
func consoleStart(t *testing.T, extra string, change func(*config)) (*fakeEngine, *daemon) {
	t.Helper()
	e, d := start(t, change)
	consoleService(t, d, "web", extra)
	return e, d
}

func consoleService(t *testing.T, d *daemon, id, extra string) {
	t.Helper()
	d.do(t, "POST", "/service", createBodyJSON(id, extra)).want(t, 201)
	d.do(t, "POST", "/service/"+id+"/ctl", `{"op":"start"}`).want(t, 204)
}

// consoleCalls returns the calls to the engine that have the text in them.
func consoleCalls(e *fakeEngine, text string) (found []string) {
	for _, call := range e.calls() {
		if strings.Contains(call, text) {
			found = append(found, call)
		}
	}
	return found
}

// consoleHook has f answer the engine's calls whose path ends so, and reports when one is over.
func consoleHook(e *fakeEngine, suffix string,
	f func(w http.ResponseWriter, r *http.Request)) (over chan struct{}) {
	over = make(chan struct{}, 1000)
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, suffix) {
			return false
		}
		defer func() { over <- struct{}{} }()
		f(w, r)
		return true
	})
	return over
}

// consoleEnds are what ends a service's run.
var consoleEnds = map[string]func(*testing.T, *fakeEngine, *daemon){
	"stop":   statsEnds["stop"],
	"kill":   statsEnds["kill"],
	"delete": statsEnds["delete"],
	"its process's end": func(t *testing.T, e *fakeEngine, d *daemon) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.byName("web").Running = false
		e.change()
	},
	"restart": func(t *testing.T, e *fakeEngine, d *daemon) {
		d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
	},
	"restart with another environment": func(t *testing.T, e *fakeEngine, d *daemon) {
		d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
		d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
	},
	"delete and create": func(t *testing.T, e *fakeEngine, d *daemon) {
		d.do(t, "DELETE", "/service/web", "").want(t, 204)
		consoleService(t, d, "web", "")
	},
}

// consoleRaw answers with a text instead of HTTP, and hangs up.
func consoleRaw(w http.ResponseWriter, text string) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	io.WriteString(conn, text)
}

func TestSizeOfTheTTY(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", nil)
	for body, want := range map[string]string{`{"rows":24,"cols":80}`: "24x80", `{"cols":1,"rows":1}`: "1x1",
		`{"rows":65535,"cols":65535}`: "65535x65535"} {
		d.do(t, "POST", "/service/web/tty", body).want(t, 204)
		if c, _ := e.container("web"); c.tty != want {
			t.Errorf("%s set %s", body, c.tty)
		}
	}
}

func TestSizeOfATTYThatIsNotThere(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	const size = `{"rows":24,"cols":80}`
	d.do(t, "POST", "/service/web/tty", size).want(t, 409, "does not run")
	consoleService(t, d, "plain", `"tty":false`)
	d.do(t, "POST", "/service/plain/tty", size).want(t, 409, "tty")
	d.do(t, "POST", "/service/nobody/tty", size).want(t, 404)
	if calls := consoleCalls(e, "/resize"); len(calls) > 0 {
		t.Errorf("the engine was asked %q", calls)
	}
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
	for _, status := range []int{409, 404} { // it has stopped; a start has replaced it
		consoleHook(e, "/resize", func(w http.ResponseWriter, r *http.Request) {
			reply(w, status, "Container web is not there")
		})
		d.do(t, "POST", "/service/web/tty", size).want(t, 409)
	}
}

func TestConsoleReachesNoOtherContainer(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", nil)
	foreign := e.addForeign("theirs", map[string]string{labelService: "theirs"})
	e.print("theirs", stdcopy.Stdout, "secret")
	other := e.addForeign("plain", nil)
	web, _ := e.container("web")
	for _, id := range []string{"theirs", "plain", foreign[:12], foreign[:63], other[:2], web.ID[:12],
		web.ID[:63], web.ID, "we", "webs", "Web"} {
		for path, method := range map[string]string{"logs": "GET", "logs?follow=true": "GET", "stdin": "POST",
			"tty": "POST"} {
			body := map[bool]string{true: `{"rows":24,"cols":80}`}[method == "POST"]
			a := d.do(t, method, "/service/"+id+"/"+path, body)
			if a.status != 404 || strings.Contains(a.body, "secret") {
				t.Errorf("%s /service/%s/%s: %d %s", method, id, path, a.status, a.body)
			}
		}
	}
	for _, action := range []string{"/logs", "/attach", "/resize"} {
		if calls := consoleCalls(e, action); len(calls) > 0 {
			t.Errorf("the engine was asked %q", calls)
		}
	}
	// A service whose id begins the id of another's container is reached by its own.
	prefix := foreign[:10]
	consoleService(t, d, prefix, "")
	e.print(prefix, stdcopy.Stdout, "mine")
	if a := d.do(t, "GET", "/service/"+prefix+"/logs", "").want(t, 200); a.body != "mine" {
		t.Errorf("logs of %s: %q", prefix, a.body)
	}
	d.do(t, "POST", "/service/"+prefix+"/stdin", "for me").want(t, 204)
	if all := e.input(prefix); all != "for me" {
		t.Errorf("it has read %q", all)
	}
	d.do(t, "POST", "/service/"+prefix+"/tty", `{"rows":24,"cols":80}`).want(t, 204)
	for _, name := range []string{"theirs", "plain", "web"} {
		if c, _ := e.container(name); len(c.stdin) > 0 || c.tty != "" {
			t.Errorf("%s was reached: %+v", name, c)
		}
	}
}
