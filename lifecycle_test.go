package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
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
	tree := openTree(t, dir)
	defer tree.Close()
	opened := make(chan error, 1)
	go func() { // ends with the call
		_, err := openBelow(tree, "pipe")
		opened <- err
	}()
	select {
	case err := <-opened:
		if !errors.Is(err, syscall.ENOTDIR) {
			t.Errorf("opening a pipe as a directory: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("the pipe is waited for")
	}
}

func openTree(t *testing.T, dir string) *os.Root {
	t.Helper()
	tree, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// bareServer returns a daemon's server on a root of its own, without the network and without
// a run that would settle: a test calls its operations.
func bareServer(t *testing.T, e *fakeEngine, change func(*config)) *server {
	t.Helper()
	cfg, err := parseConfig(nil, func(string) (string, bool) { return "", false }, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(&cfg)
	}
	binds, err := openBinds(tempInMemory(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(binds.close)
	engine, err := newEngine(e.host())
	if err != nil {
		t.Fatal(err)
	}
	if err := engine.meet(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { engine.api().Close() })
	life, end := context.WithCancel(context.Background())
	t.Cleanup(end)
	return newServer(life, life, cfg, coreKey{}, engine, binds, slog.New(slog.DiscardHandler))
}

// bareService returns such a server with a service web.
func bareService(t *testing.T) (*fakeEngine, *server) {
	t.Helper()
	e := newFakeEngine(t)
	e.addImage("img:1")
	s := bareServer(t, e, nil)
	if err := s.create(t.Context(), serviceParams{ID: "web", Image: "img:1", BindDir: "/data"}, ""); err != nil {
		t.Fatal(err)
	}
	return e, s
}

// found is what settle may find of a service, and in the end leaves.
type found struct {
	containers map[string]string // by name; each is called by what it was in the beginning
	dir        string            // "", "empty" or "data"
	gone       bool
}

// foundNext are the kinds of containers that wait for a start; the current one has the number 3
// and the birth b, what a start has chosen the number 5.
var foundNext = map[string]struct {
	birth  string
	number int
}{"higher": {"b", 7}, "highest": {"b", 8}, "between": {"b", 4}, "equal": {"b", 3}, "lower": {"b", 2}, "another birth's": {"c", 9}}

// foundEverything calls f with each combination of what there can be of the service web.
func foundEverything(f func(found)) {
	waiting := [][]string{nil}
	kinds := slices.Sorted(maps.Keys(foundNext))
	for i, kind := range kinds {
		waiting = append(waiting, []string{kind})
		for _, other := range kinds[i+1:] {
			waiting = append(waiting, []string{kind, other})
		}
	}
	for has := range 1 << 5 {
		for _, next := range waiting {
			for _, dir := range []string{"", "empty", "data"} {
				all := found{containers: map[string]string{}, dir: dir, gone: has&16 != 0}
				for bit, name := range []string{"web", "duxcore.new.web", "duxcore.now.web", "old"} {
					if has&(1<<bit) != 0 {
						all.containers[name] = name
					}
				}
				for _, kind := range next {
					all.containers[nextName("web", foundNext[kind].number)] = kind
				}
				f(all)
			}
		}
	}
}

// settled says in other words than the code what the table makes of it. It is not ok if the
// table says that nothing is done.
func (f found) settled() (after found, ok bool) {
	after = found{containers: map[string]string{}, dir: f.dir}
	has := func(name string) bool { return f.containers[name] != "" }
	if has("old") {
		return f, false
	}
	createDied := has("duxcore.new.web") && !has("web") && !has("duxcore.now.web")
	if createDied && !f.gone {
		after.dir = ""
	}
	if createDied || f.gone {
		return after, true
	}
	least := 0
	switch {
	case has("duxcore.now.web"):
		after.containers["web"], least = "duxcore.now.web", 5
	case has("web"):
		after.containers["web"], least = "web", 3
	default:
		return after, true
	}
	for _, kind := range []string{"highest", "higher", "between"} {
		name := nextName("web", foundNext[kind].number)
		if f.containers[name] == kind && foundNext[kind].number > least {
			after.containers[name] = kind
			break
		}
	}
	return after, true
}

// Every state that a service can be found in, and what settling has to make of it.
func TestSettleDoesWhatItsTableSays(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	s := bareServer(t, e, nil)
	states := 0
	foundEverything(func(before found) {
		states++
		before.put(t, e, s)
		want, ok := before.settled()
		current, next, err := s.settle(t.Context(), "web")
		if !ok && (err == nil || !strings.Contains(err.Error(), `"/old"`)) || ok && err != nil {
			t.Fatalf("%+v: %v", before, err)
		}
		if is := foundNow(t, e, s); !reflect.DeepEqual(is, want) {
			t.Fatalf("%+v became %+v, want %+v", before, is, want)
		}
		for name, c := range map[string]*listed{"web": current, "duxcore.next.": next} {
			isThere := slices.ContainsFunc(slices.Collect(maps.Keys(want.containers)), func(other string) bool { return strings.HasPrefix(other, name) })
			if ok && isThere != (c != nil) {
				t.Fatalf("%+v: %s is returned as %v", before, name, c)
			}
		}
		asked := len(e.calls())
		s.settle(t.Context(), "web")
		if again := e.calls()[asked:]; len(again) != 1 || !reflect.DeepEqual(foundNow(t, e, s), want) {
			t.Fatalf("%+v: settled again it became %+v, by %q", before, foundNow(t, e, s), again)
		}
	})
	t.Logf("%d states", states)
}

// put makes it so.
func (f found) put(t *testing.T, e *fakeEngine, s *server) {
	t.Helper()
	e.containers, e.volumes, e.recorded = nil, map[string]bool{}, nil
	for name, kind := range f.containers {
		birth, number := "b", map[string]int{"web": 3, "duxcore.now.web": 5}[kind]
		if next, ok := foundNext[kind]; ok {
			birth, number = next.birth, next.number
		}
		e.addForeign(name, map[string]string{labelService: "web", labelBinds: s.binds.path, labelBirth: birth,
			labelNumber: strconv.Itoa(number), "kind": kind}, filepath.Join(s.binds.path, "web"))
		e.byName(name).Running = name == "web" // though a start has chosen another one
	}
	dir, gone := filepath.Join(s.binds.path, "web"), filepath.Join(s.binds.path, goneDir, "web")
	err := errors.Join(os.RemoveAll(dir), os.RemoveAll(gone))
	if f.dir != "" {
		err = errors.Join(err, os.Mkdir(dir, 0o700))
	}
	if f.dir == "data" {
		err = errors.Join(err, os.WriteFile(dir+"/file", nil, 0o600))
	}
	if f.gone {
		err = errors.Join(err, os.MkdirAll(gone+"/sub", 0o700))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// foundNow returns what there is.
func foundNow(t *testing.T, e *fakeEngine, s *server) found {
	t.Helper()
	f := found{containers: map[string]string{}}
	for _, name := range e.names() {
		f.containers[name] = e.byName(name).Labels["kind"]
	}
	for _, name := range bindDirs(t, s.binds.path) {
		switch name {
		case "web":
			f.dir = "empty"
			if entries, err := os.ReadDir(filepath.Join(s.binds.path, "web")); err != nil || len(entries) > 0 {
				f.dir = "data"
			}
		case goneDir + "/web":
			f.gone = true
		default:
			t.Fatalf("there is %s", name)
		}
	}
	return f
}

// A container that was given another name may still run and use the directory.
func TestServiceRenamedByHandIsAConflictAndKeepsItsData(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	data := filepath.Join(d.binds, "web", "data")
	if err := os.WriteFile(data, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
	d.do(t, "PATCH", "/service/web/env", `{"A":"2"}`).want(t, 204)
	e.rename("web", "old")
	before := state(t, e, d)
	for _, request := range []struct{ method, path, body string }{
		{"DELETE", "/service/web", ""}, {"PATCH", "/service/web/env", `{"A":"3"}`}, {"POST", "/service", createBodyJSON("web", "")},
		{"POST", "/service/web/ctl", `{"op":"start"}`}, {"POST", "/service/web/ctl", `{"op":"restart"}`}, {"POST", "/service/web/ctl", `{"op":"stop"}`},
	} {
		d.do(t, request.method, request.path, request.body).want(t, 409, "old")
		if after := state(t, e, d); after != before {
			t.Fatalf("%s %s: %s, and then%s", request.method, request.path, before, after)
		}
	}
	d.do(t, "GET", "/service/web", "").want(t, 404)
	d.do(t, "GET", "/service", "").want(t, 200, "[]")
	if text, err := os.ReadFile(data); err != nil || string(text) != "precious" {
		t.Errorf("the data: %q, %v", text, err)
	}
	// Two names for one service's directory are one too many, whatever the other one is called.
	e.rename("duxcore.next.web.2", "web")
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 409, "old")
	e.rename("web", "duxcore.next.web.2")
	e.rename("old", "web")
	d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	wantNothing(t, d, e)
}

// A docker commit of a service makes an image with its labels, and a docker run of that a container.
func TestContainerOfACommittedServiceIsNobodysBusiness(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	c, _ := e.container("web")
	copied := e.addForeign("copy", c.Labels)
	next := e.addForeign("duxcore.next.web.1", c.Labels)
	d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	if left := bindDirs(t, d.binds); len(left) > 0 {
		t.Errorf("DELETE has left %q", left)
	}
	for name, id := range map[string]string{"copy": copied, "duxcore.next.web.1": next} {
		if c, _ := e.container(name); c.ID != id || !c.Running {
			t.Errorf("%s was touched: %+v", name, c)
		}
	}
}

// A root that was moved, with a link left in its place, or that has another name now.
func TestMovedBindRootKeepsItsServices(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addImage("img:1")
	dir := t.TempDir()
	before, after := filepath.Join(dir, "binds"), filepath.Join(dir, "bigger")
	use := func(path string) func(*config) { return func(c *config) { c.binds = path } }
	d := startDaemon(t, e.host(), use(before))
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	d.do(t, "POST", "/service", createBodyJSON("empty", "")).want(t, 201)
	if err := errors.Join(d.stop(), os.WriteFile(before+"/web/data", []byte("precious"), 0o600), os.Rename(before, after), os.Symlink("bigger", before)); err != nil {
		t.Fatal(err)
	}
	if _, err := startError(t, func(c *config) { c.binds, c.dockerHost = after, e.host() }); err == nil || !strings.Contains(err.Error(), "-binds "+before) {
		t.Errorf("with the new path the daemon ends with: %v", err)
	}
	// It cannot know before its engine is there.
	e.close()
	d = startDaemon(t, e.host(), use(after))
	e.reopen()
	for _, request := range []struct{ method, path, body string }{
		{"GET", "/service", ""}, {"GET", "/service/web", ""}, {"DELETE", "/service/web", ""}, {"DELETE", "/service/empty", ""},
		{"POST", "/service", createBodyJSON("empty", "")}, {"POST", "/service", createBodyJSON("new", "")},
		{"PATCH", "/service/web/env", "{}"}, {"POST", "/service/web/ctl", `{"op":"start"}`}, {"GET", "/health", ""},
	} {
		d.do(t, request.method, request.path, request.body).want(t, 500)
	}
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	d = startDaemon(t, e.host(), use(before))
	if got := bindDirs(t, before); !slices.Equal(got, []string{"empty", "web"}) {
		t.Errorf("the root holds %q", got)
	}
	d.do(t, "GET", "/service/web", "").want(t, 200)
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	d.do(t, "DELETE", "/service/empty", "").want(t, 204)
	if got := bindDirs(t, after); len(got) > 0 || len(e.names()) > 0 {
		t.Errorf("left: %q, %q", got, e.names())
	}
}

// Another daemon's root may have become anything.
func TestBindRootOfAnotherDaemonThatCannotBeLookedAtHidesNothing(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	loop := filepath.Join(filepath.Dir(d.binds), "loop")
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	e.addForeign("theirs", map[string]string{labelService: "theirs", labelBinds: loop}, filepath.Join(loop, "theirs"))
	e.addForeign(nameNew+"half", map[string]string{labelService: "half", labelBinds: d.binds}, filepath.Join(d.binds, "half"))
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	d = startDaemon(t, e.host(), func(c *config) { c.binds = d.binds })
	if got := e.names(); !slices.Equal(got, []string{"theirs", "web"}) {
		t.Errorf("there are %q: nothing was settled", got)
	}
	d.do(t, "GET", "/service", "").want(t, 200, `"/web"`)
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	d.do(t, "DELETE", "/service/theirs", "").want(t, 404)
}

func TestEngineThatListsNothingForAMomentCostsNoService(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		lists := strings.HasSuffix(r.URL.Path, "/containers/json")
		if lists {
			io.WriteString(w, "[]")
		}
		return lists
	})
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	before := e.names()
	d = startDaemon(t, e.host(), func(c *config) { c.binds = d.binds })
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 404)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 409)
	d.do(t, "DELETE", "/service/web", "").want(t, 409)
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		lists, inspects := strings.HasSuffix(r.URL.Path, "/containers/json"), strings.HasSuffix(r.URL.Path, "/web/json")
		if lists {
			io.WriteString(w, "[]")
		} else if inspects {
			reply(w, 500, "cannot look")
		}
		return lists || inspects
	})
	d.do(t, "DELETE", "/service/web", "").want(t, 502)
	e.setIntercept(nil)
	if got := bindDirs(t, d.binds); !slices.Equal(got, []string{"web"}) || !slices.Equal(e.names(), before) {
		t.Errorf("there are %q, %q", got, e.names())
	}
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
}

// An administrator may have put a link where a bind directory is looked for.
func TestLinkInThePlaceOfABindDirectoryIsNotFollowed(t *testing.T) {
	t.Parallel()
	for _, target := range []string{"web", "../web", "/etc"} { // the second leads to the first from where it is on its way out
		e, d := startWithService(t)
		data := filepath.Join(d.binds, "web", "data")
		if err := errors.Join(os.WriteFile(data, []byte("precious"), 0o600), os.Symlink(target, filepath.Join(d.binds, "link"))); err != nil {
			t.Fatal(err)
		}
		d.do(t, "POST", "/service", createBodyJSON("link", "")).want(t, 409)
		d.do(t, "DELETE", "/service/link", "").want(t, 204)
		if got := bindDirs(t, d.binds); !slices.Equal(got, []string{"web"}) || len(e.names()) != 1 {
			t.Errorf("%s: there are %q, %q", target, got, e.names())
		}
		if text, err := os.ReadFile(data); err != nil || string(text) != "precious" {
			t.Errorf("%s: the data: %q, %v", target, text, err)
		}
	}
}

// A create finds out at its commit that there is a service which the engine has not listed.
func TestCreateThatIsUndoneKeepsAServiceThatWasNotListed(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	before := state(t, e, d)
	hidden := 0
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		hides := hidden < 2 && (strings.HasSuffix(r.URL.Path, "/containers/json") || strings.HasSuffix(r.URL.Path, "/web/json"))
		if hides && strings.HasSuffix(r.URL.Path, "/web/json") {
			reply(w, 404, "No such container: web")
		} else if hides {
			io.WriteString(w, "[]")
		}
		if hides {
			hidden++
		}
		return hides
	})
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 409)
	if after := state(t, e, d); after != before {
		t.Errorf("before%s\nafter%s", before, after)
	}
}

func TestServiceThatCannotBeSettledHidesNoOther(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	d.do(t, "POST", "/service", createBodyJSON("other", "")).want(t, 201)
	d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
	refuse := func(w http.ResponseWriter, r *http.Request) bool {
		refused := r.URL.Query().Get("name") == "web"
		if refused {
			reply(w, 409, "refused")
		}
		return refused
	}
	e.setIntercept(refuse)
	before := len(e.calls())
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 409, "refused")
	if renames := countCalls(e.calls()[before:], "rename?name=web"); renames != 1 {
		t.Errorf("it was tried %d times", renames)
	}
	d.do(t, "GET", "/service", "").want(t, 200, `"/web"`, `"/other"`)
	d.do(t, "GET", "/service/other", "").want(t, 200)
	d.do(t, "GET", "/service/web", "").want(t, 504)
	e.setIntercept(nil)
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
	d.do(t, "GET", "/service/web", "").want(t, 200, "A=1")
}

// countCalls returns how many calls have the text in them.
func countCalls(calls []string, text string) (count int) {
	for _, call := range calls {
		if strings.Contains(call, text) {
			count++
		}
	}
	return count
}

func TestHungCallOfARoundHoldsUpNoOtherService(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	s := bareServer(t, e, func(c *config) { c.waits.settle = 500 * time.Millisecond })
	half := func(id string) {
		e.addForeign(nameNew+id, map[string]string{labelService: id, labelBinds: s.binds.path}, filepath.Join(s.binds.path, id))
	}
	half("hangs")
	half("beside") // in the same round
	hung := e.byName(nameNew + "hangs").ID
	held, release := crowdHold(e, func(call string) bool { return strings.Contains(call, "DELETE /containers/"+hung) })
	defer release()
	rounds := make(chan struct{})
	go func() { s.settleRound(); close(rounds) }() // ends with the deadline of what hangs
	<-held
	waitFor(t, "the other one of the round", func() bool { return slices.Equal(e.names(), []string{nameNew + "hangs"}) })
	half("web")
	s.settleRound() // another one, which the first does not hold up
	if got := e.names(); !slices.Equal(got, []string{nameNew + "hangs"}) {
		t.Errorf("there are %q", got)
	}
	<-rounds
	release()
	if _, _, err := s.settle(t.Context(), "hangs"); err != nil {
		t.Error(err)
	}
	unlock, err := s.locks.lock(t.Context(), "hangs")
	if err != nil {
		t.Fatal(err)
	}
	unlock()
	if got, left := e.names(), bindDirs(t, s.binds.path); len(got) > 0 || len(left) > 0 {
		t.Errorf("left: %q, %q", got, left)
	}
}

// Nor does it hold up the daemon's start, or what a later round finds.
func TestHungCallOfTheFirstRoundIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	binds := filepath.Join(t.TempDir(), "binds")
	half := func(id string) (containerID string) {
		return e.addForeign(nameNew+id, map[string]string{labelService: id, labelBinds: binds}, filepath.Join(binds, id))
	}
	hung := half("hangs")
	_, release := crowdHold(e, func(call string) bool { return strings.Contains(call, "DELETE /containers/"+hung) })
	d := startDaemon(t, e.host(), func(c *config) { c.binds, c.waits.round = binds, 100*time.Millisecond })
	half("web")
	waitFor(t, "a later round", func() bool { return slices.Equal(e.names(), []string{nameNew + "hangs"}) })
	release()
	waitFor(t, "the hung call", func() bool { return len(e.names()) == 0 && len(bindDirs(t, d.binds)) == 0 })
}

// A conflict or a 404 of the engine's is an answer, not a reason to do it again.
func TestEnginesAnswerEndsAnOperation(t *testing.T) {
	t.Parallel()
	for _, status := range []int{404, 409} {
		for _, op := range []string{"start", "restart"} {
			e, d := startWithService(t)
			e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
				starts := strings.HasSuffix(r.URL.Path, "/start")
				if starts {
					reply(w, status, "cannot start a paused container, try unpause instead")
				}
				return starts
			})
			before := len(e.calls())
			d.do(t, "POST", "/service/web/ctl", `{"op":"`+op+`"}`).want(t, map[int]int{404: 502, 409: 409}[status], "unpause")
			calls := e.calls()[before:]
			if starts, stops := countCalls(calls, "/start"), countCalls(calls, "/stop"); starts != 1 || stops > 1 {
				t.Errorf("%s: the engine was asked %q", op, calls)
			}
		}
	}
}

// What a dead daemon's late call has made can have the name that a create or a PATCH needs.
func TestLateCallsDoNotTakeNames(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	web, _ := e.container("web")
	comeLate := func(name, id, number string) func(http.ResponseWriter, *http.Request) bool {
		var once sync.Once
		return func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, "/containers/create") {
				once.Do(func() {
					e.addForeign(name, map[string]string{labelService: id, labelBinds: d.binds, labelNumber: number,
						labelBirth: web.Labels[labelBirth]}, filepath.Join(d.binds, id))
					e.byName(name).Running = false
				})
			}
			return false
		}
	}
	refused := 0
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		refuses := r.URL.Query().Get("name") == "duxcore.new.slow" && refused < 3
		if refuses { // the engine still makes the one that has the name, and does not show it
			refused++
			reply(w, 409, "Conflict. The container name is already in use")
		}
		return refuses
	})
	d.do(t, "POST", "/service", createBodyJSON("slow", "")).want(t, 201)
	d.do(t, "DELETE", "/service/slow", "").want(t, 204)
	e.addForeign("duxcore.new.theirs", nil)
	d.do(t, "POST", "/service", createBodyJSON("theirs", "")).want(t, 409, "duxcore.new.theirs")
	e.setIntercept(comeLate("duxcore.new.other", "other", "0"))
	d.do(t, "POST", "/service", createBodyJSON("other", "")).want(t, 201)
	e.setIntercept(comeLate("duxcore.next.web.1", "web", "1"))
	d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
	e.setIntercept(nil)
	if got := e.names(); !slices.Equal(got, []string{"duxcore.new.theirs", "duxcore.next.web.2", "other", "web"}) {
		t.Errorf("there are %q", got)
	}
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
	d.do(t, "GET", "/service/web", "").want(t, 200, "A=1")
}

// Nothing is gone because the file system could not say that it is there.
func TestErrorOfTheFileSystemIsNoAbsence(t *testing.T) {
	t.Parallel()
	e, s := bareService(t)
	e.rename("web", "duxcore.now.web") // a start that died
	before := e.names()
	s.binds.root.Close() // now every look fails, with an error that is not ENOENT
	for name, do := range map[string]func() error{
		"settle": func() error { _, _, err := s.settle(t.Context(), "web"); return err },
		"DELETE": func() error { return s.change(t.Context(), t.Context(), "web", s.removeService) },
		"start":  func() error { return s.changeExisting(t.Context(), "web", s.start) },
		"create": func() error {
			return s.create(t.Context(), serviceParams{ID: "new", Image: "img:1", BindDir: "/data"}, "")
		},
	} {
		err := do()
		if kind, _ := describe(cmp.Or(err, errors.New("none"))); err == nil || kind.status < 500 {
			t.Errorf("%s: %v %v", name, kind, err)
		}
		if after := e.names(); !slices.Equal(after, before) {
			t.Fatalf("%s made %q of %q", name, after, before)
		}
	}
	for name, err := range map[string]error{
		"remove": s.removeService(t.Context(), "web", nil, nil), "free": s.binds.free("web"), "discard": s.binds.discard("web"),
		"allGone": func() error { _, err := s.binds.allGone(); return err }(),
	} {
		if kind, _ := describe(cmp.Or(err, errors.New("none"))); err == nil || kind.status < 500 {
			t.Errorf("%s: %v", name, err)
		}
	}
	tree := openTree(t, t.TempDir())
	u := &unpacker{root: tree, parent: tree, parentDir: "."}
	tree.Close()
	if err := u.placeLink("a", "b"); err == nil || errors.Is(err, errLinkTarget) {
		t.Errorf("an archive's link to what cannot be looked at: %v", err)
	}
}

// countingContext counts, now and then as empty asks whether to go on, the descriptors of a directory.
type countingContext struct {
	context.Context
	dir         string
	asked, most int
}

func (c *countingContext) Err() error {
	if c.asked++; c.asked%100 != 0 { // to count takes longer than to remove
		return nil
	}
	open, _ := os.ReadDir("/proc/self/fd")
	count := 0
	for _, fd := range open {
		if path, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(path, c.dir) {
			count++
		}
	}
	c.most = max(c.most, count)
	return nil
}

// A customer nests directories by the thousand, wide and deep.
func TestTreeOfAnyShapeIsEmptiedWithFewDescriptors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	outside := filepath.Join(dir, "outside")
	if err := errors.Join(os.WriteFile(outside, nil, 0o600), os.Mkdir(dir+"/tree", 0o700)); err != nil {
		t.Fatal(err)
	}
	below := openTree(t, dir+"/tree")
	for depth := range 1500 {
		err := errors.Join(below.Symlink(outside, "link"), below.WriteFile("file", nil, 0o600))
		for i := range depth % 5 {
			err = errors.Join(err, below.MkdirAll(fmt.Sprintf("%d/with/some/below", i), 0o700))
		}
		err = errors.Join(err, below.Mkdir("deeper", 0o700))
		deeper, openErr := below.OpenRoot("deeper")
		if err = errors.Join(err, openErr); err != nil {
			t.Fatal(err)
		}
		below.Close()
		below = deeper
	}
	below.Close()
	ctx := &countingContext{Context: t.Context(), dir: dir}
	if err := empty(ctx, openTree(t, dir+"/tree")); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir + "/tree"); err != nil || len(left) > 0 {
		t.Errorf("left: %v %v", left, err)
	}
	if _, err := os.Stat(outside); err != nil {
		t.Error(err)
	}
	if ctx.most < 2 || ctx.most > 150 {
		t.Errorf("%d descriptors were open", ctx.most)
	}
}
