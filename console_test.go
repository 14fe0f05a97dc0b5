package main

import (
	"testing"

	"github.com/docker/docker/pkg/stdcopy"
)

func TestConsoleSmoke(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, nil)
	e.print("web", stdcopy.Stdout, "hello\n")
	if a := d.do(t, "GET", "/service/web/logs", "").want(t, 200); a.body != "hello\n" {
		t.Errorf("%q", a.body)
	}
	d.do(t, "POST", "/service/web/stdin", "one\n").want(t, 204)
	d.do(t, "POST", "/service/web/stdin", "two\n").want(t, 204)
	if all, by := e.input("web"); all != "one\ntwo\n" || len(by) != 2 {
		t.Errorf("%q %v", all, by)
	}
	d.do(t, "POST", "/service/web/tty", `{"rows":24,"cols":80}`).want(t, 204)
	if c, _ := e.container("web"); c.tty != "24x80" {
		t.Errorf("%q", c.tty)
	}
}
