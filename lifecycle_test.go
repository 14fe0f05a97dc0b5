package main

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestCreateOfATakenIDTouchesNothingEvenIfTheEngineCannotInspectIt(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addImage("img:1")
	d := startDaemon(t, e.host(), nil)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	before, err := os.Stat(filepath.Join(d.binds, "web"))
	if err != nil {
		t.Fatal(err)
	}
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/web/json") {
			return false
		}
		http.Error(w, "driver failed", http.StatusInternalServerError)
		return true
	})
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 409, "web")
	after, err := os.Stat(filepath.Join(d.binds, "web"))
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("the service has another bind directory: %v", err)
	}
}

func TestContainersWithoutANameAreNoServices(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), nil)
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/containers/json") {
			return false
		}
		io.WriteString(w, `[{"Id":"1","Names":[""],"Labels":{"duxcore.service":"web"}},{"Id":"2","Labels":{"duxcore.service":"a/b"}}]`)
		return true
	})
	if a := d.do(t, "GET", "/service", "").want(t, 200); strings.TrimSpace(a.body) != "[]" {
		t.Errorf("services: %s", a.body)
	}
}

func TestDirectoryOfAContainerWithAnotherNameIsKept(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addImage("img:1")
	d := startDaemon(t, e.host(), nil)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	e.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("POST", "/v1.41/containers/web/rename?name=mine", nil))
	if _, ok := e.container("mine"); !ok {
		t.Fatal("the container was not renamed")
	}
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 404) // and settles
	if _, err := os.Stat(filepath.Join(d.binds, "web")); err != nil {
		t.Error(err)
	}
}

func TestArgumentsThatAreNoFlagsAreMistakes(t *testing.T) {
	t.Parallel()
	for _, arguments := range []string{"---", "-=x", "-pids-limit x ---y -stop-timeout z"} {
		_, err := parseConfig(strings.Fields(arguments), func(string) (string, bool) { return "", false }, io.Discard)
		if err == nil {
			t.Errorf("%q is accepted", arguments)
		}
	}
}

func TestConnectionThatWasIdleForLongIsAskedToContinue(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addImage("img:1")
	d := startDaemon(t, e.host(), func(c *config) { c.waits.write = 100 * time.Millisecond })
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	c, err := net.Dial("tcp", strings.TrimPrefix(d.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	answers := bufio.NewReader(c)
	head := "Host: h\r\nX-Duxcore-CoreKey: " + d.key + "\r\n"
	io.WriteString(c, "GET /health HTTP/1.1\r\n"+head+"\r\n")
	first, err := http.ReadResponse(answers, nil)
	if err != nil || first.StatusCode != http.StatusNoContent {
		t.Fatalf("%v %v", first, err)
	}
	// Longer than the daemon would wait for its answer to be taken: the quiet itself is the condition.
	c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	if text, err := answers.Peek(1); err == nil {
		t.Fatalf("the daemon says %q", text)
	}
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	io.WriteString(c, "PATCH /service/web/env HTTP/1.1\r\n"+head+"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
	line, err := answers.ReadString('\n')
	if err != nil || !strings.Contains(line, "100 Continue") {
		t.Errorf("the daemon answers %q, %v", line, err)
	}
}

// Whoever still writes to a tree that is deleted can put a pipe where a directory was.
func TestPipeInThePlaceOfADirectoryIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	tree, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	read := make(chan error, 1)
	go func() { // ends with the read
		_, err := readSome(tree, "pipe")
		read <- err
	}()
	select {
	case err := <-read:
		if !errors.Is(err, syscall.ENOTDIR) {
			t.Errorf("reading a pipe as a directory: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("the pipe is waited for")
	}
}
