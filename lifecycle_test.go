package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/docker/docker/api/types"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/client"
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
	e.answerWith("/containers/json", 200, `[{"Id":"1","Names":[""],"Labels":{"duxcore.service":"web"}},{"Id":"2","Labels":{"duxcore.service":"a/b"}}]`)
	if a := d.do(t, "GET", "/service", "").want(t, 200); strings.TrimSpace(a.body) != "[]" {
		t.Errorf("services: %s", a.body)
	}
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

func TestEngineThatListsNothingForAMomentCostsNoService(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	e.answerWith("/containers/json", 200, "[]")
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
			e.answerWith("/start", status, `{"message":"cannot start a paused container, try unpause instead"}`)
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

var exploreSizes = flag.String("explore", "3 1 1 1, 4 1 1 0, 4 0 0 1", "sizes of the histories: requests, deaths, late calls and engine errors")

// TestEveryHistoryKeepsItsPromises takes the real code through every history of three requests
// to one service, of which the first creates it, in which the daemon dies once, at one of the
// engine's calls, before it, after it, or with the call still on its way, to be carried out at
// any later moment; and in which the engine fails once, with or without having done what it was
// asked for. Without some of these it takes four requests. What was answered has to be there in
// the end, and nothing half done. The first history of each sequence that breaks that is printed.
//
// A death ends the request's goroutine, which runs what it has deferred: a daemon that is killed
// does not, so that nothing that settling depends on may be deferred.
func TestEveryHistoryKeepsItsPromises(t *testing.T) {
	t.Parallel()
	for size := range strings.SplitSeq(*exploreSizes, ",") {
		var requests, deaths, lates, errors int
		if _, err := fmt.Sscan(size, &requests, &deaths, &lates, &errors); err != nil {
			t.Fatal(err)
		}
		exploreAll(t, requests, deaths, lates, errors)
	}
}

func exploreAll(t *testing.T, requests, deaths, lates, errors int) {
	sequences := [][]string{{"create"}}
	for range requests - 1 {
		var longer [][]string
		for _, ops := range sequences {
			for _, op := range []string{"create", "patch", "restart", "delete"} {
				longer = append(longer, append(slices.Clone(ops), op))
			}
		}
		sequences = longer
	}
	var histories atomic.Int64
	t.Run(fmt.Sprint(requests, " requests"), func(t *testing.T) {
		for _, ops := range sequences {
			t.Run(strings.Join(ops, " "), func(t *testing.T) {
				t.Parallel()
				for c := new(choices); ; {
					w := newExploration(t, c, deaths, lates, errors)
					w.run(ops)
					histories.Add(1)
					if w.broken != "" {
						t.Fatalf("%s\n%s", w.broken, strings.Join(w.trace, "\n"))
					}
					if !c.next() {
						return
					}
				}
			})
		}
	})
	t.Logf("%d histories of %d requests, %d deaths, %d late calls, %d errors", histories.Load(), requests, deaths, lates, errors)
}

// choices are those of one history. The next one repeats them up to the last that can be made
// otherwise: all are made, depth first.
type choices struct {
	made [][2]int // the choice, and of how many
	at   int
}

func (c *choices) choose(of int) int {
	if of == 1 {
		return 0
	}
	if c.at == len(c.made) {
		c.made = append(c.made, [2]int{0, of})
	}
	c.at++
	return c.made[c.at-1][0]
}

// next reports whether there is another history.
func (c *choices) next() bool {
	for len(c.made) > 0 && c.made[len(c.made)-1][0]+1 == c.made[len(c.made)-1][1] {
		c.made = c.made[:len(c.made)-1]
	}
	if len(c.made) > 0 {
		c.made[len(c.made)-1][0]++
	}
	c.at = 0
	return len(c.made) > 0
}

// exploration is one history: an engine, a bind root, and one daemon after the other.
type exploration struct {
	*choices
	t                     *testing.T
	deaths, lates, errors int // that may still come
	engine                *fakeEngine
	dir                   string
	daemon                *server
	late                  []*http.Request // of a daemon that is dead
	lateNext              []*container.Config
	lateNow               []string // environments of the containers that were to be chosen
	used                  string   // the birth of the service that has data in its directory
	trace                 []string
	broken                string // the first promise
}

// serviceState is what a client may find: the environments of the service and of its next start.
type serviceState struct{ current, next string }

func newExploration(t *testing.T, c *choices, deaths, lates, errors int) *exploration {
	t.Helper()
	w := &exploration{choices: c, t: t, deaths: deaths, lates: lates, errors: errors, engine: bareFakeEngine(t)}
	w.engine.newImage("img:1", []string{"/run"})
	w.dir = tempInMemory(t)
	w.start()
	return w
}

// start starts a daemon, in place of one that is dead.
func (w *exploration) start() {
	if w.daemon != nil {
		w.daemon.binds.close()
	}
	binds, err := openBinds(w.dir)
	if err != nil {
		w.t.Fatal(err)
	}
	sdk, err := client.NewClientWithOpts(client.WithHost("tcp://engine:1"))
	if err == nil {
		err = client.WithHTTPClient(&http.Client{Transport: w})(sdk)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	sdk.NegotiateAPIVersionPing(types.Ping{APIVersion: w.engine.dialect.newest})
	e := &engine{}
	e.sdk.Store(sdk)
	cfg, err := parseConfig(nil, func(string) (string, bool) { return "", false }, io.Discard)
	if err != nil {
		w.t.Fatal(err)
	}
	w.daemon = newServer(context.Background(), context.Background(), cfg, keyDigest{}, e, binds, slog.New(slog.DiscardHandler))
	w.daemon.fetcher.client.Transport = exploreContents{w}
}

// exploreContents is where bind_contents come from. The daemon can die in the middle of them.
type exploreContents struct{ w *exploration }

var exploreArchive = tgz(file("first", "1"), file("second", "2"))

func (c exploreContents) RoundTrip(*http.Request) (*http.Response, error) {
	w := c.w
	body := io.MultiReader(bytes.NewReader(exploreArchive[:len(exploreArchive)/2]), c, bytes.NewReader(exploreArchive[len(exploreArchive)/2:]))
	w.note("   unpacks")
	return &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(body)}, nil
}

// Read is where the download has come half-way.
func (c exploreContents) Read([]byte) (int, error) {
	if c.w.deaths > 0 && c.w.choose(2) == 1 {
		c.w.deaths--
		c.w.note("   dies in the middle of it")
		runtime.Goexit()
	}
	return 0, io.EOF
}

// RoundTrip is a call of the daemon's to the engine. It does not return if the daemon dies.
func (w *exploration) RoundTrip(r *http.Request) (*http.Response, error) {
	for len(w.late) > 0 && w.choose(2) == 1 {
		w.carryOutLate()
	}
	what := exploreName(r)
	changes := r.Method != http.MethodGet
	if w.errors > 0 && w.choose(2) == 1 {
		w.errors--
		if changes && w.choose(2) == 1 {
			w.note("   fails, though carried out: %s", what)
			w.carryOut(r)
		} else {
			w.note("   fails: %s", what)
		}
		failed := httptest.NewRecorder()
		reply(failed, 500, "failed")
		return failed.Result(), nil
	}
	kind := 0
	if w.deaths > 0 {
		switch {
		case !changes:
			kind = w.choose(2)
		case w.lates == 0:
			kind = w.choose(3)
		default:
			kind = w.choose(4)
		}
	}
	if kind != 0 {
		w.deaths--
	}
	switch kind {
	case 1:
		w.note("   dies before %s", what)
		runtime.Goexit()
	case 2:
		w.note("   dies after %s", what)
		w.carryOut(r)
		runtime.Goexit()
	case 3:
		w.lates--
		w.note("   dies, and on its way is %s", what)
		w.hold(r)
		runtime.Goexit()
	}
	w.note("   %s", what)
	return w.carryOut(r), nil
}

func (w *exploration) note(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf(format, args...))
}

func exploreName(r *http.Request) string {
	path := strings.Replace(versionPrefix.ReplaceAllString(r.URL.Path, ""), "/containers", "", 1)
	for part := range strings.SplitSeq(path, "/") {
		if len(part) == 64 {
			path = strings.Replace(path, part, part[:6], 1)
		}
	}
	return strings.TrimSpace(r.Method + " " + path + " " + r.URL.Query().Get("name"))
}

func (w *exploration) carryOut(r *http.Request) *http.Response {
	answer := httptest.NewRecorder()
	if r.Body == nil { // which a server never sees
		r.Body = http.NoBody
	}
	w.engine.ServeHTTP(answer, r)
	return answer.Result()
}

// hold keeps a call for later, and what it may then bring about.
func (w *exploration) hold(r *http.Request) {
	late := r.Clone(context.Background())
	if r.Body != nil {
		text, _ := io.ReadAll(r.Body)
		late.Body = io.NopCloser(bytes.NewReader(text))
		var config container.Config
		json.Unmarshal(text, &config)
		if strings.HasPrefix(r.URL.Query().Get("name"), nameNext) {
			w.lateNext = append(w.lateNext, &config)
		}
	}
	if strings.HasPrefix(r.URL.Query().Get("name"), nameNow) {
		for _, c := range w.engine.containers {
			if strings.Contains(r.URL.Path, c.ID) {
				w.lateNow = append(w.lateNow, c.Config.Env[0])
			}
		}
	}
	w.late = append(w.late, late)
}

func (w *exploration) carryOutLate() {
	w.note("   late: %s", exploreName(w.late[0]))
	w.carryOut(w.late[0])
	w.late = w.late[1:]
}

// do sends one request. It reports whether the daemon lived to answer it.
func (w *exploration) do(f func() error) (answered bool, err error) {
	over := make(chan struct{})
	go func() { // ends with the request or the daemon
		defer close(over)
		err = f()
		answered = true
	}()
	<-over
	return answered, err
}

// run takes the requests in turn. may is the set of the states that the answers so far allow.
func (w *exploration) run(ops []string) {
	defer os.RemoveAll(w.dir)
	defer func() { w.daemon.binds.close() }()
	may := map[serviceState]bool{{}: true}
	for i, op := range ops {
		env := fmt.Sprintf("E=%d", i)
		quiet := len(w.late) == 0
		w.note("%s %s", op, env)
		answered, err := w.do(func() error { return w.send(op, env) })
		status := 0
		if err != nil {
			kind, _ := describe(err)
			status = kind.status
		}
		switch {
		case answered && err == nil:
			may = exploreAfter(may, op, env)
			w.promise(len(may) > 0, "%s is answered with success, which cannot be", op)
			runs := slices.ContainsFunc(w.engine.containers, func(c *fakeContainer) bool { return c.Running })
			w.promise(op != "restart" || runs, "a restart has succeeded, and the service does not run")
			if w.broken != "" {
				return
			}
		case answered:
			w.note("   answered %d %v", status, err)
			refused := exploreRefused(may, op, env)
			if (status == 404 || status == 409) && len(refused) > 0 {
				may = refused
				break
			}
			w.promise(!quiet || status == 502, "%s is answered with %d %v", op, status, err)
			maps.Copy(may, exploreDone(may, op, env))
		default:
			maps.Copy(may, exploreDone(may, op, env))
			for alive := false; !alive; {
				w.start()
				alive, _ = w.do(func() error { _, _, err := w.daemon.settle(context.Background(), "web"); return err })
			}
		}
		w.use()
	}
	w.deaths, w.lates, w.errors = 0, 0, 0
	w.note("in the end")
	for range 3 {
		for len(w.late) > 0 {
			w.carryOutLate()
		}
		w.do(func() error { _, _, err := w.daemon.settle(context.Background(), "web"); return err })
	}
	w.judge(w.withLate(may))
}

// send does one request, as its handler would.
func (w *exploration) send(op, env string) error {
	ctx := context.Background()
	switch op {
	case "create":
		return w.daemon.create(ctx, serviceParams{ID: "web", Image: "img:1", BindDir: "/data", Env: []string{env},
			BindContents: "http://contents/"}, "")
	case "patch":
		return w.daemon.setEnv(ctx, "web", []string{env})
	case "restart":
		return w.daemon.changeExisting(ctx, "web", w.daemon.restart)
	default:
		return w.daemon.change(ctx, ctx, "web", w.daemon.removeService)
	}
}

// use has a service that is there write into its directory, as it would.
func (w *exploration) use() {
	_, gone := os.Lstat(filepath.Join(w.dir, goneDir, "web"))
	if c := w.engine.byName("web"); c != nil && errors.Is(gone, os.ErrNotExist) {
		w.used = c.Labels[labelBirth]
		err := os.WriteFile(filepath.Join(w.dir, "web", "data"), []byte(w.used), 0o600)
		w.promise(err == nil, "a service has no directory: %v", err)
	}
}

// promise notes the first promise that does not hold.
func (w *exploration) promise(holds bool, format string, args ...any) {
	if !holds && w.broken == "" {
		w.broken = fmt.Sprintf(format, args...)
	}
}

// after returns what a request makes of a state, unless it has to be refused.
func (s serviceState) after(op, env string) (serviceState, bool) {
	switch {
	case op == "create":
		return serviceState{env, ""}, s.current == ""
	case s.current == "":
		return s, false
	case op == "patch":
		return serviceState{s.current, env}, true
	case op == "restart" && s.next != "":
		return serviceState{s.next, ""}, true
	case op == "restart":
		return s, true
	}
	return serviceState{}, true
}

// exploreDone returns what a request makes of the states that it can succeed in.
func exploreDone(may map[serviceState]bool, op, env string) map[serviceState]bool {
	done := map[serviceState]bool{}
	for s := range may {
		if after, ok := s.after(op, env); ok {
			done[after] = true
		}
	}
	return done
}

// exploreAfter is that for a request that has succeeded: also a DELETE of a directory that a dead
// daemon's create has left.
func exploreAfter(may map[serviceState]bool, op, env string) map[serviceState]bool {
	done := exploreDone(may, op, env)
	if op == "delete" && may[serviceState{}] {
		done[serviceState{}] = true
	}
	return done
}

// exploreRefused returns the states in which a request has to be refused.
func exploreRefused(may map[serviceState]bool, op, env string) map[serviceState]bool {
	refused := map[serviceState]bool{}
	for s := range may {
		if _, ok := s.after(op, env); !ok {
			refused[s] = true
		}
	}
	return refused
}

// withLate adds what a call that came late may have brought about: what it would have if it had
// been sent last, unless that is for an earlier service of the same id.
func (w *exploration) withLate(may map[serviceState]bool) map[serviceState]bool {
	all := maps.Clone(may)
	current := w.engine.byName("web")
	for _, late := range w.lateNext {
		if current == nil || late.Labels[labelBirth] == current.Labels[labelBirth] {
			for s := range may {
				if s.current != "" && s.next == "" {
					all[serviceState{s.current, late.Env[0]}] = true
				}
			}
		}
	}
	for _, env := range w.lateNow {
		for s := range maps.Clone(all) {
			if s.next == env {
				all[serviceState{env, ""}] = true
			} else if s.next != "" { // by which it is outnumbered
				all[serviceState{env, s.next}] = true
			}
		}
	}
	return all
}

// judge looks at what is left in the end.
func (w *exploration) judge(may map[serviceState]bool) {
	var is serviceState
	names := w.engine.names()
	for _, name := range names {
		c, _ := w.engine.container(name)
		switch {
		case name == "web":
			is.current = c.Config.Env[0]
		case strings.HasPrefix(name, nameNext) && is.next == "":
			is.next = c.Config.Env[0]
		default:
			w.promise(false, "left: %q", names)
		}
	}
	w.promise(may[is], "the service is %+v, may be %v", is, slices.Collect(maps.Keys(may)))
	left, err := os.ReadDir(filepath.Join(w.dir, goneDir))
	w.promise(err == nil && len(left) == 0, "left on its way out: %v %v", left, err)
	entries, err := os.ReadDir(filepath.Join(w.dir, "web"))
	if is.current == "" {
		w.promise(errors.Is(err, os.ErrNotExist) || err == nil && len(entries) == 0, "left: the directory with %v, %v", entries, err)
		w.promise(len(names) == 0 && len(w.engine.volumes) == 0, "left: %q, volumes %v", names, w.engine.volumes)
		return
	}
	w.promise(err == nil, "the directory is lost: %v", err)
	want := ""
	if w.used == w.engine.byName("web").Labels[labelBirth] {
		want = w.used
	}
	first, _ := os.ReadFile(filepath.Join(w.dir, "web", "first"))
	second, _ := os.ReadFile(filepath.Join(w.dir, "web", "second"))
	w.promise(string(first)+string(second) == "12", "the contents are %q and %q", first, second)
	data, err := os.ReadFile(filepath.Join(w.dir, "web", "data"))
	w.promise(string(data) == want && (err == nil || want == ""), "the directory has the data %q, not %q", data, want)
	w.promise(len(w.engine.volumes) == 1 && w.engine.volumes[w.engine.byName("web").volume], "the volumes are %v", w.engine.volumes)
}

func crowdRuns(e *fakeEngine, id string) bool {
	c, _ := e.container(id)
	return c.Running
}

func crowdDescriptors() int {
	open, _ := os.ReadDir("/proc/self/fd")
	return len(open)
}

func TestOneOfTenCreatesOfOneIDWins(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addImage("img:1")
	d := startDaemon(t, e.host(), nil)
	held, release := crowdHold(e, func(call string) bool { return strings.HasPrefix(call, "POST /containers/create") })
	var answers []<-chan answer
	for i := range 10 {
		answers = append(answers, crowdSend(t, d, "POST", "/service", createBodyJSON("web", fmt.Sprintf(`"env":["N=%d"]`, i))))
	}
	<-held // one is in the middle of it
	release()
	won := -1
	for i, sent := range answers {
		a := <-sent
		if a.status == 201 && won < 0 {
			won = i
		} else {
			a.want(t, 409, "web")
		}
	}
	if c, _ := e.container("web"); !slices.Equal(c.Config.Env, []string{fmt.Sprintf("N=%d", won)}) {
		t.Errorf("%d won, and the service has %q", won, c.Config.Env)
	}
	if got := state(t, e, d); strings.Count(got, "container:") != 1 || strings.Count(got, "dir:") != 1 {
		t.Errorf("there is%s", got)
	}
}

// Forty clients do ten things each, on twenty services.
func TestCrowdLeavesAConsistentEnd(t *testing.T) { // not parallel: it counts the process's goroutines
	source := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) { w.Write(tgz(file("hello", "world"))) })
	crowdLeavesNothing(t, func() {
		e := newFakeEngine(t)
		e.addImage("img:1")
		d := startDaemon(t, e.host(), func(c *config) { c.fetchAllow = networks("127.0.0.0/8") })
		var ids []string
		for i := range 20 {
			ids = append(ids, fmt.Sprintf("s%d", i))
		}
		var clients sync.WaitGroup
		for client := range 40 {
			clients.Go(func() { crowdClient(t, d, client, ids, fmt.Sprintf(`"bind_contents":%q`, source.URL)) })
		}
		clients.Wait()
		crowdWantConsistent(t, e, d, ids)
		for _, id := range ids {
			if a := d.do(t, "DELETE", "/service/"+id, ""); a.status != 204 {
				a.want(t, 404)
			}
		}
		wantNothing(t, d, e)
		d.stop()
		e.close()
		source.CloseClientConnections()
	})
}

func crowdClient(t *testing.T, d *daemon, client int, ids []string, contents string) {
	random := mathrand.New(mathrand.NewPCG(uint64(client), 0))
	for turn := range 10 {
		id := ids[random.IntN(len(ids))]
		service := "/service/" + id
		method, path, body := "GET", service, ""
		switch (client + turn) % 12 {
		case 0:
			method, path, body = "POST", "/service", createBodyJSON(id, "")
		case 1, 2:
			method, path, body = "POST", "/service", createBodyJSON(id, contents)
		case 3, 4:
			method, path, body = "POST", service+"/ctl", `{"op":"start"}`
		case 5:
			method, path, body = "POST", service+"/ctl", `{"op":"stop"}`
		case 6:
			method, path, body = "POST", service+"/ctl", `{"op":"restart"}`
		case 7:
			method, path, body = "POST", service+"/ctl", `{"op":"kill"}`
		case 8:
			method, path, body = "PATCH", service+"/env", fmt.Sprintf(`{"A":"%d.%d"}`, client, turn)
		case 9:
			method = []string{"DELETE", "GET"}[turn%2]
		case 10:
			path = "/service"
		case 11:
			path = service + "/stats"
		}
		a := d.do(t, method, path, body)
		if !slices.Contains([]int{200, 201, 204, 404, 409}, a.status) {
			t.Errorf("%s %s %s: %d %s", method, path, body, a.status, a.body)
		}
	}
}

// crowdWantConsistent wants of each service all or nothing, and nothing else.
func crowdWantConsistent(t *testing.T, e *fakeEngine, d *daemon, ids []string) {
	t.Helper()
	var want []string
	for _, id := range ids {
		_, exists := e.container(id)
		status := 404
		if exists {
			want, status = append(want, id), 200
		}
		d.do(t, "GET", "/service/"+id, "").want(t, status)
	}
	slices.Sort(want)
	waiting := func(name string) bool { // for its service's next start
		id, _, ok := strings.Cut(strings.TrimPrefix(name, nameNext), ".")
		return ok && slices.Contains(want, id)
	}
	if got := slices.DeleteFunc(e.names(), waiting); !slices.Equal(got, want) {
		t.Errorf("the services are %q, the containers %q", want, e.names())
	}
	if got := bindDirs(t, d.binds); !slices.Equal(got, want) {
		t.Errorf("the services are %q, the directories %q", want, got)
	}
	var list []container.Summary
	if err := json.Unmarshal([]byte(d.do(t, "GET", "/service", "").want(t, 200).body), &list); err != nil || len(list) != len(want) {
		t.Errorf("the services are %q, the list has %d: %v", want, len(list), err)
	}
}

// CVE-2025-69199, CVE-2026-52857.
func TestSlowCreateDelaysNoOtherService(t *testing.T) {
	t.Parallel()
	asked, free := make(chan struct{}), make(chan struct{})
	source := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		close(asked)
		<-free
		w.Write(tgz(file("hello", "world")))
	})
	d, e := startFetching(t, "127.0.0.0/8")
	slow := crowdSend(t, d, "POST", "/service", createBodyJSON("slow", fmt.Sprintf(`"bind_contents":%q`, source.URL)))
	<-asked
	for _, step := range []struct {
		method, path, body string
		status             int
	}{
		{"POST", "/service", createBodyJSON("web", ""), 201},
		{"POST", "/service/web/ctl", `{"op":"start"}`, 204},
		{"GET", "/service/web/stats", "", 200},
		{"PATCH", "/service/web/env", `{"A":"1"}`, 204},
		{"POST", "/service/web/ctl", `{"op":"restart"}`, 204},
		{"GET", "/service/web", "", 200},
		{"GET", "/service/slow", "", 404},
		{"DELETE", "/service/web", "", 204},
		{"GET", "/service", "", 200},
		{"POST", "/docker/image", wholeTar(), 201},
		{"GET", "/health", "", 204},
	} {
		d.do(t, step.method, step.path, step.body).want(t, step.status)
	}
	close(free)
	(<-slow).want(t, 201)
	if got := e.names(); !slices.Equal(got, []string{"slow"}) {
		t.Errorf("containers %q", got)
	}
}

func TestKillAnswersWhileAStopWaits(t *testing.T) {
	t.Parallel()
	for _, op := range []string{"stop", "restart"} {
		e, d := startWithService(t)
		d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
		held, release := crowdHold(e, func(call string) bool { return strings.Contains(call, "/stop") })
		changed := crowdSend(t, d, "POST", "/service/web/ctl", `{"op":"`+op+`"}`)
		<-held
		d.do(t, "POST", "/service/web/ctl", `{"op":"kill"}`).want(t, 204)
		if crowdRuns(e, "web") {
			t.Error("kill has answered and the service runs")
		}
		release()
		(<-changed).want(t, 204)
		if crowdRuns(e, "web") != (op == "restart") {
			t.Errorf("after %s: running is %v", op, crowdRuns(e, "web"))
		}
	}
}

func TestReadsAnswerWhileAChangeWaits(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		method, path, body string
		at                 string // the engine's call that waits
		status             int    // of a read of the service
	}{
		{"POST", "/service", createBodyJSON("new", ""), "POST /containers/create", 404},
		{"POST", "/service", createBodyJSON("new", ""), "rename?name=new", 404},
		{"POST", "/service/web/ctl", `{"op":"stop"}`, "/stop", 200},
		{"POST", "/service/web/ctl", `{"op":"restart"}`, "/start", 200},
		{"POST", "/service/web/ctl", `{"op":"restart"}`, "DELETE /containers/", 200},
		{"PATCH", "/service/web/env", `{"A":"2"}`, "POST /containers/create", 200},
		{"PATCH", "/service/web/env", `{"A":"2"}`, "DELETE /containers/", 200},
		{"POST", "/service/web/ctl", `{"op":"restart"}`, "rename?name=duxcore.now.web", 200},
		{"DELETE", "/service/web", "", "DELETE /containers/", 200}, // that of the next one
	} {
		e, d := startWithService(t)
		d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
		d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
		held, release := crowdHold(e, func(call string) bool { return strings.Contains(call, test.at) })
		changed := crowdSend(t, d, test.method, test.path, test.body)
		<-held
		service := "/service/web"
		if test.method == "POST" && test.path == "/service" {
			service = "/service/new"
		}
		d.do(t, "GET", service, "").want(t, test.status)
		d.do(t, "GET", service+"/stats", "").want(t, test.status)
		d.do(t, "GET", "/service", "").want(t, 200)
		d.do(t, "GET", "/health", "").want(t, 204)
		release()
		if a := <-changed; a.status > 204 {
			t.Errorf("%s %s, held at %q: %d %s", test.method, test.path, test.at, a.status, a.body)
		}
	}
}

// Between the removal of a service's container and the renaming of its successor there
// is none of its name.
func TestServiceIsNeverMissingWhileItsContainerIsReplaced(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"/service/web", "/service/web/stats", "/service"} {
		e, d := startWithService(t)
		d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
		held, release := crowdHold(e, func(call string) bool { return strings.Contains(call, "rename?name=web") })
		started := crowdSend(t, d, "POST", "/service/web/ctl", `{"op":"start"}`)
		<-held
		before := len(e.calls())
		var reads []<-chan answer
		for range 10 {
			reads = append(reads, crowdSend(t, d, "GET", path, ""))
		}
		waitFor(t, "each read has asked the engine for its containers", func() bool {
			lists := 0
			for _, call := range e.calls()[before:] {
				if strings.HasPrefix(call, "GET /containers/json") {
					lists++
				}
			}
			return lists >= len(reads)
		})
		release()
		(<-started).want(t, 204)
		for _, read := range reads {
			(<-read).want(t, 200, `"/web"`)
		}
	}
}

func TestServiceIsFoundAtEveryMomentOfManyRestarts(t *testing.T) {
	t.Parallel()
	_, d := startWithService(t)
	done := make(chan struct{})
	var readers sync.WaitGroup
	for _, path := range []string{"/service/web", "/service/web", "/service", "/service/web/stats"} {
		readers.Go(func() {
			for {
				if a := d.do(t, "GET", path, ""); a.status != 200 || !strings.Contains(a.body, `"/web"`) {
					t.Errorf("GET %s: %d %s", path, a.status, a.body)
				}
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	for i := range 15 {
		d.do(t, "PATCH", "/service/web/env", fmt.Sprintf(`{"A":"%d"}`, i)).want(t, 204)
		d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
	}
	close(done)
	readers.Wait()
}
