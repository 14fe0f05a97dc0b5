package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
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

// found is a state of the service web, before or after it is settled.
type found struct {
	record     string            // "", or the environment that it has, and the pending one behind a slash
	marked     bool              // being created or deleted
	containers map[string]string // by name: which it is, or the environment of one that settle has made
	dir        string            // "", "empty" or "data"
}

// foundEverything calls f with each combination of what there can be of the service web.
func foundEverything(f func(state found, running bool)) {
	kinds := []string{"", "right", "other"}
	for _, record := range []string{"", "E=1", "E=1/E=2"} {
		for _, current := range kinds {
			for _, candidate := range kinds {
				for _, dir := range []string{"", "empty", "data"} {
					for bits := range 1 << 3 {
						state := found{record: record, marked: bits&1 != 0, dir: dir, containers: map[string]string{}}
						for name, kind := range map[string]string{"web": current, candidatePrefix + "web": candidate} {
							if kind != "" {
								state.containers[name] = kind + " " + name
							}
						}
						if bits&2 != 0 {
							state.containers["old"] = "right old"
						}
						f(state, bits&4 != 0)
					}
				}
			}
		}
	}
}

// settled says in other words than the code what the table makes of a state. It is not ok if there is an error.
func (f found) settled() (after found, ok bool) {
	if f.containers["old"] != "" {
		return f, false
	}
	if f.marked {
		return found{containers: map[string]string{}}, true
	}
	after = found{record: f.record, containers: map[string]string{}, dir: f.dir}
	current, candidate := f.containers["web"], f.containers[candidatePrefix+"web"]
	if f.record == "" {
		if current != "" && f.dir != "" {
			after.containers["web"] = current
		}
		return after, true
	}
	switch {
	case strings.HasPrefix(current, "right"):
		after.containers["web"] = current
		return after, true
	case strings.HasPrefix(candidate, "right"):
		after.containers["web"] = candidate
		return after, true
	}
	_, pending, isPending := strings.Cut(f.record, "/")
	if isPending {
		after.record = pending
	}
	if f.dir != "" {
		after.containers["web"] = "made with " + after.record
	} else if current != "" { // the engine makes no container without its directory
		after.containers["web"] = current
	}
	return after, f.dir != ""
}

// Every state that a service can be found in, and what settling has to make of it.
func TestSettleDoesWhatItsTableSays(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	image := e.addImage("img:1")
	s := bareServer(t, e, nil).services
	states := 0
	foundEverything(func(before found, running bool) {
		states++
		before.put(t, e, s.binds, image, running)
		want, ok := before.settled()
		svc, err := s.settle(t.Context(), "web")
		if ok != (err == nil) {
			t.Fatalf("%+v: %v", before, err)
		}
		if is := foundNow(t, e, s.binds); !reflect.DeepEqual(is, want) {
			t.Fatalf("%+v became %+v, want %+v", before, is, want)
		}
		if ok && (svc != nil) != (want.record != "") {
			t.Fatalf("%+v is returned as %+v", before, svc)
		}
		if svc != nil && ok {
			c, _ := e.container("web")
			record, err := s.binds.record("web")
			if err != nil || svc.containerID != c.ID || svc.running != c.Running || c.Labels[labelRevision] != record.Revision {
				t.Fatalf("%+v is returned as %+v, of the record %+v, %v", before, svc, record, err)
			}
		}
		if !ok {
			return
		}
		asked := len(e.calls())
		s.settle(t.Context(), "web")
		if again := e.calls()[asked:]; len(again) != 1 || !reflect.DeepEqual(foundNow(t, e, s.binds), want) {
			t.Fatalf("%+v: settled again it became %+v, by %q", before, foundNow(t, e, s.binds), again)
		}
	})
	t.Logf("%d states", states)
}

// put makes a state.
func (f found) put(t *testing.T, e *fakeEngine, b *bindRoot, image string, running bool) {
	t.Helper()
	e.containers, e.volumes, e.recorded = nil, map[string]bool{}, nil
	for name, kind := range f.containers {
		e.addForeign(name, map[string]string{labelService: "web", labelBinds: b.path,
			labelRevision: strings.Fields(kind)[0], "kind": kind}, filepath.Join(b.path, "web"))
		e.byName(name).Running = running && name == "web"
	}
	dir := filepath.Join(b.path, "web")
	err := errors.Join(os.RemoveAll(dir), b.removeRecord("web"), b.unmark("web"))
	if f.dir != "" {
		err = errors.Join(err, os.Mkdir(dir, 0o700))
	}
	if f.dir == "data" {
		err = errors.Join(err, os.WriteFile(dir+"/file", nil, 0o600))
	}
	if f.record != "" {
		spec := func(env string) serviceSpec {
			return serviceSpec{serviceParams{ID: "web", Image: "img:1", BindDir: "/data", Env: []string{env}}, image, ""}
		}
		env, pending, isPending := strings.Cut(f.record, "/")
		record := serviceRecord{serviceSpec: spec(env), Revision: "right"}
		if isPending {
			next := spec(pending)
			record.Pending = &next
		}
		err = errors.Join(err, b.writeRecord("web", record))
	}
	if f.marked {
		err = errors.Join(err, b.mark("web"))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// foundNow returns the state that there is.
func foundNow(t *testing.T, e *fakeEngine, b *bindRoot) found {
	t.Helper()
	f := found{containers: map[string]string{}}
	for _, name := range e.names() {
		c := e.byName(name)
		f.containers[name] = c.Labels["kind"]
		if f.containers[name] == "" {
			f.containers[name] = "made with " + c.Config.Env[0]
		}
	}
	record, err := b.record("web")
	if err != nil {
		t.Fatal(err)
	}
	if record != nil {
		f.record = record.Params.Env[0]
		if record.Pending != nil {
			f.record += "/" + record.Pending.Params.Env[0]
		}
	}
	for _, name := range bindDirs(t, b.path) {
		switch name {
		case "web":
			f.dir = "empty"
			if entries, err := os.ReadDir(filepath.Join(b.path, "web")); err != nil || len(entries) > 0 {
				f.dir = "data"
			}
		case recordDir + "/web":
		case markDir + "/web":
			f.marked = true
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
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
	d.do(t, "PATCH", "/service/web/env", `{"A":"2"}`).want(t, 204)
	e.rename("web", "old")
	before := state(t, e, d)
	refused := []struct{ method, path, body string }{
		{"DELETE", "/service/web", ""}, {"POST", "/service", createBodyJSON("web", "")},
		{"POST", "/service/web/ctl", `{"op":"start"}`}, {"POST", "/service/web/ctl", `{"op":"restart"}`},
		{"POST", "/service/web/ctl", `{"op":"stop"}`}, {"POST", "/service/web/ctl", `{"op":"kill"}`},
		{"GET", "/service/web", ""}, {"GET", "/service/web/stats", ""}, {"GET", "/service/web/logs", ""},
	}
	for _, request := range refused {
		d.do(t, request.method, request.path, request.body).want(t, 409, "old", "renamed_by_hand")
		if after := state(t, e, d); after != before {
			t.Fatalf("%s %s: %s, and then%s", request.method, request.path, before, after)
		}
	}
	d.do(t, "GET", "/service", "").want(t, 200, "[]")
	// Whatever else has the service's name now: the renamed container may use the directory.
	e.addForeign("web", map[string]string{labelService: "web", labelBinds: d.binds}, filepath.Join(d.binds, "web"))
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 409, "old")
	d.do(t, "DELETE", "/service/web", "").want(t, 409, "old")
	e.rename("web", "third")
	e.rename("old", "web")
	d.do(t, "DELETE", "/service/web", "").want(t, 409, "third")
	e.drop("third")
	d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
	if text, err := os.ReadFile(data); err != nil || string(text) != "precious" {
		t.Errorf("the data: %q, %v", text, err)
	}
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	wantNothing(t, d, e)
}

// A docker commit of a service makes an image with its labels, and a docker run of that image a container.
func TestContainerOfACommittedServiceIsIgnored(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	c, _ := e.container("web")
	copied := e.addForeign("copy", c.Labels)
	candidate := e.addForeign(candidatePrefix+"web", c.Labels)
	d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	if left := bindDirs(t, d.binds); len(left) > 0 {
		t.Errorf("DELETE has left %q", left)
	}
	for name, id := range map[string]string{"copy": copied, candidatePrefix + "web": candidate} {
		if c, _ := e.container(name); c.ID != id || !c.Running {
			t.Errorf("%s was touched: %+v", name, c)
		}
	}
}

func TestEngineThatListsNothingForAMomentCostsNoService(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	before := state(t, e, d)
	e.answerWith("/containers/json", 200, "[]")
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	d = startDaemon(t, e.host(), func(c *config) { c.binds = d.binds })
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 409)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 409)
	e.setIntercept(nil)
	d.do(t, "POST", "/service/web/ctl", `{"op":"stop"}`).want(t, 204)
	if after := state(t, e, d); after != before {
		t.Errorf("before%s\nafter%s", before, after)
	}
}

// Nor does it put in force what is pending, which would stop a running service in the next round.
func TestEngineThatListsNothingForAMomentStopsNoService(t *testing.T) {
	t.Parallel()
	e, server := bareService(t)
	s := server.services
	err := errors.Join(s.change(t.Context(), "web", s.start), s.setEnv(t.Context(), "web", []string{"A=1"}))
	if err != nil {
		t.Fatal(err)
	}
	e.answerWith("/containers/json", 200, "[]")
	s.settleAll(t.Context())
	e.setIntercept(nil)
	if err := s.settleAll(t.Context()); err != nil {
		t.Error(err)
	}
	if c, _ := e.container("web"); !c.Running || len(c.Config.Env) > 0 {
		t.Errorf("the service runs: %v, with %q", c.Running, c.Config.Env)
	}
}

func TestServiceThatCannotBeSettledHidesNoOther(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	d.do(t, "POST", "/service", createBodyJSON("other", "")).want(t, 201)
	d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		refused := r.URL.Query().Get("name") == "web"
		if refused {
			reply(w, 409, "refused")
		}
		return refused
	})
	before := len(e.calls())
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 409, "refused")
	if renames := countCalls(e.calls()[before:], "rename?name=web"); renames != 1 {
		t.Errorf("it was tried %d times", renames)
	}
	d.do(t, "GET", "/service", "").want(t, 200, `"/other"`)
	d.do(t, "GET", "/service/other", "").want(t, 200)
	d.do(t, "GET", "/service/web", "").want(t, 503, "unavailable")
	e.setIntercept(nil)
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
	d.do(t, "GET", "/service/web", "").want(t, 200, "A=1")
}

// halfDone has the engine hold what a create that was killed has left of a service.
func halfDone(e *fakeEngine, binds, id string) (containerID string) {
	return e.addForeign(candidatePrefix+id, map[string]string{labelService: id, labelBinds: binds}, filepath.Join(binds, id))
}

// A service whose settling hangs keeps the next ones waiting until its own deadline, and no longer.
func TestHungCallOfARoundEndsAtItsDeadline(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	s := bareServer(t, e, func(c *config) { c.timeouts.settle = 100 * time.Millisecond }).services
	hung := halfDone(e, s.binds.path, "hangs")
	halfDone(e, s.binds.path, "later")
	_, release := crowdHold(e, func(call string) bool { return strings.Contains(call, "DELETE /containers/"+hung) })
	defer release()
	if err := s.settleAll(t.Context()); err != nil {
		t.Error(err)
	}
	if got := e.names(); !slices.Equal(got, []string{candidatePrefix + "hangs"}) {
		t.Errorf("there are %q", got)
	}
	release()
	if err := s.settleAll(t.Context()); err != nil {
		t.Error(err)
	}
	if got, left := e.names(), bindDirs(t, s.binds.path); len(got) > 0 || len(left) > 0 {
		t.Errorf("left: %q, %q", got, left)
	}
}

// A call that hangs while the daemon starts does not keep it from serving.
func TestHungCallOfTheFirstRoundIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	binds := filepath.Join(t.TempDir(), "binds")
	if err := os.MkdirAll(filepath.Join(binds, recordDir), 0o700); err != nil {
		t.Fatal(err)
	}
	hung := halfDone(e, binds, "hangs")
	_, release := crowdHold(e, func(call string) bool { return strings.Contains(call, "DELETE /containers/"+hung) })
	d := startDaemon(t, e.host(), func(c *config) { c.binds, c.timeouts.settleInterval = binds, 100*time.Millisecond })
	d.do(t, "GET", "/health", "").want(t, 204)
	release()
	waitFor(t, "the hung call", func() bool { return len(e.names()) == 0 && len(bindDirs(t, d.binds)) == 0 })
}

// An engine whose socket is there but that does not answer yet is asked again within seconds.
func TestEngineThatStartsAfterTheDaemonIsFoundSoon(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	e.prune()
	e.close()
	d = startDaemon(t, e.host(), func(c *config) { c.binds = d.binds })
	e.reopen()
	waitFor(t, "the service has its container again", func() bool { return slices.Equal(e.names(), []string{"web"}) })
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

// The container that a late call of a dead daemon makes takes a name. That makes one request fail, and the next
// settle removes it.
func TestLateCallMakesOneRequestFail(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	comeLate := func(id string) {
		var once sync.Once
		e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, "/containers/create") {
				once.Do(func() { halfDone(e, d.binds, id) })
			}
			return false
		})
	}
	comeLate("other")
	d.do(t, "POST", "/service", createBodyJSON("other", "")).want(t, 409, "engine_conflict")
	if got := bindDirs(t, d.binds); !slices.Equal(got, []string{"web"}) {
		t.Errorf("left: %q", got)
	}
	d.do(t, "POST", "/service", createBodyJSON("other", "")).want(t, 201)
	d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
	comeLate("web")
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 409, "engine_conflict")
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
	d.do(t, "GET", "/service/web", "").want(t, 200, "A=1")
	if got := e.names(); !slices.Equal(got, []string{"other", "web"}) {
		t.Errorf("there are %q", got)
	}
}

// docker start $(docker ps -aq) after a reboot starts whatever an operation that was killed has left.
func TestCandidateThatWasStartedByHandDoesNotStay(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
	if got := e.names(); !slices.Equal(got, []string{"web"}) {
		t.Errorf("a pending change has made %q", got)
	}
	halfDone(e, d.binds, "web") // it runs
	d.do(t, "POST", "/service/web/ctl", `{"op":"stop"}`).want(t, 204)
	if c, _ := e.container("web"); c.Running || !slices.Equal(e.names(), []string{"web"}) {
		t.Errorf("there are %q", e.names())
	}
}

func TestPruneCostsNoService(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
	e.prune()
	d.do(t, "GET", "/service/web", "").want(t, 503, "unavailable")
	d.do(t, "GET", "/service/web/params", "").want(t, 200, `"pending":`, `"A=1"`)
	d.do(t, "POST", "/service", createBodyJSON("other", "")).want(t, 201)
	e.prune()
	before := len(e.calls())
	d.do(t, "GET", "/service", "").want(t, 200, "[]")
	if lists := countCalls(e.calls()[before:], "GET /containers/json"); lists != 2 {
		t.Errorf("the engine was asked for %d lists", lists) // one more in all, not one a service
	}
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
	d.do(t, "GET", "/service/web", "").want(t, 200, "A=1")
	e.prune() // it runs: nothing happens
	d.do(t, "GET", "/service/web", "").want(t, 200, "A=1")
}

// A backup of the bind root is all of a machine's services; the images come beside it.
func TestRestoredBindRootMakesAllServicesAgain(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	extra := `"env":["A=<&>"],"max_ram":67108864,"max_cpu":50000,"port_map":{"80/tcp":{"HostPort":"8080"}},"cmd":["x"],"user":"1000:5"`
	d.do(t, "POST", "/service", createBodyJSON("full", extra)).want(t, 201)
	before, _ := e.container("full")
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	machine := newFakeEngine(t)
	machine.images = e.images
	startDaemon(t, machine.host(), func(c *config) { c.binds = d.binds })
	after, ok := machine.container("full")
	if !ok || !reflect.DeepEqual(after.Config, before.Config) || !reflect.DeepEqual(after.HostConfig, before.HostConfig) {
		t.Errorf("before %+v %+v\nafter %+v %+v", before.Config, before.HostConfig, after.Config, after.HostConfig)
	}
	if got := machine.names(); !slices.Equal(got, []string{"full", "web"}) {
		t.Errorf("there are %q", got)
	}
}

// An id such as 78 can be the beginning of several containers' ids: the engine cannot inspect it then.
func TestIDThatSeveralContainerIDsBeginWith(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	for _, name := range []string{"one", "two"} {
		e.addForeign(name, nil)
		e.byName(name).ID = "78" + e.byName(name).ID[2:]
	}
	if err := os.Mkdir(filepath.Join(d.binds, "78"), 0o700); err != nil {
		t.Fatal(err)
	}
	d.do(t, "GET", "/service/78", "").want(t, 404)
	d.do(t, "DELETE", "/service/78", "").want(t, 204)
	d.do(t, "POST", "/service", createBodyJSON("78", "")).want(t, 201)
	d.do(t, "GET", "/service/78", "").want(t, 200)
	d.do(t, "DELETE", "/service/78", "").want(t, 204)
}

func TestPutReplacesAllParametersAtTheNextStart(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	e.addImage("img:2")
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
	before, _ := e.container("web")
	calls := len(e.calls())
	d.do(t, "PUT", "/service/web", createBodyJSON("web", `"image":"img:2","max_ram":67108864,"env":["A=1"]`)).want(t, 204)
	// The image is looked at twice: before and after the wait for the lock.
	if asked := e.calls()[calls:]; len(asked) != 2 || countCalls(asked, "GET /images/") != 2 {
		t.Errorf("the engine was asked %q", asked)
	}
	d.do(t, "PATCH", "/service/web/env", `{"B":"2"}`).want(t, 204) // of what is pending
	d.do(t, "GET", "/service/web/params", "").want(t, 200, `{"params":{"id":"web","image":"img:1","bind_dir":"/data"},`,
		`"pending":{"id":"web","image":"img:2","bind_dir":"/data","env":["B=2"],"max_ram":67108864}}`)
	d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
	after, _ := e.container("web")
	if after.HostConfig.Memory != 64<<20 || after.imageID == before.imageID || after.volume != before.volume || !after.Running {
		t.Errorf("before %+v\nafter %+v", before, after)
	}
	if a := d.do(t, "GET", "/service/web/params", "").want(t, 200, `"image":"img:2"`); strings.Contains(a.body, "pending") {
		t.Errorf("the record: %s", a.body)
	}
	for body, status := range map[string]int{
		createBodyJSON("other", ""):                              400, // another service's
		createBodyJSON("web", `"bind_dir":"/elsewhere"`):         400,
		createBodyJSON("web", `"bind_contents":"http://a/b"`):    400,
		createBodyJSON("web", `"image":"none:1"`):                404,
		createBodyJSON("web", `"max_ram":1`):                     400,
		createBodyJSON("web", `"bind_dir":"/data/","tty":false`): 204,
	} {
		d.do(t, "PUT", "/service/web", body).want(t, status)
	}
	d.do(t, "PUT", "/service/none", createBodyJSON("none", "")).want(t, 404)
	d.do(t, "PATCH", "/service/none/env", "{}").want(t, 404)
	d.do(t, "GET", "/service/none/params", "").want(t, 404)
}

// A PUT pulls without the lock. Meanwhile its service can be deleted, and the id be another customer's.
func TestPutReachesNoLaterServiceOfTheSameID(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	e.addRemote("far:1", true)
	held, release := crowdHold(e, func(call string) bool { return strings.HasPrefix(call, "POST /images/create") })
	put := crowdSend(t, d, "PUT", "/service/web", createBodyJSON("web", `"image":"far:1","env":["PASSWORD=x"]`))
	<-held
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	release()
	(<-put).want(t, 404, "no_such_service")
	if a := d.do(t, "GET", "/service/web/params", "").want(t, 200); strings.Contains(a.body, "PASSWORD") {
		t.Errorf("the later service has %s", a.body)
	}
}

// A PUT that waits for the service's lock has looked at its image before.
func TestPutLosesNoImage(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	id := strings.Split(d.do(t, "POST", "/docker/image", wholeTar()).want(t, 201).body, `"`)[3]
	held, release := crowdHold(e, func(call string) bool { return strings.HasSuffix(call, "/start") })
	started := crowdSend(t, d, "POST", "/service/web/ctl", `{"op":"start"}`)
	<-held
	before := len(e.calls())
	put := crowdSend(t, d, "PUT", "/service/web", createBodyJSON("web", fmt.Sprintf(`"cmd":["/x"],"image":%q`, id)))
	waitFor(t, "the PUT has looked at its image", func() bool { return countCalls(e.calls()[before:], "GET /images/"+id) > 0 })
	d.do(t, "DELETE", "/docker/image/"+id, "").want(t, 204)
	release()
	(<-started).want(t, 204)
	(<-put).want(t, 404, "no_such_image")
}

// A PUT with another image repairs a service whose image and container are gone.
func TestPutRepairsAServiceWhoseImageIsGone(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	e.prune()
	e.removeImages()
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 404, "no_such_image")
	d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
	e.addImage("img:2")
	d.do(t, "PUT", "/service/web", createBodyJSON("web", `"image":"img:2"`)).want(t, 204)
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
	if c, _ := e.container("web"); !c.Running {
		t.Errorf("there is %+v", c)
	}
}

// Nothing of a request is in a label, which every list repeats.
func TestListRepeatsLittleOfARequest(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	big := strings.Repeat("<", 60<<10)
	d.do(t, "PATCH", "/service/web/env", `{"A":"`+big+`"}`).want(t, 204)
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
	if c, _ := e.container("web"); !slices.Equal(c.Config.Env, []string{"A=" + big}) {
		t.Error("the variable is not the service's")
	}
	if list := d.do(t, "GET", "/service", "").want(t, 200).body; len(list) > 4<<10 {
		t.Errorf("the list has %d bytes", len(list))
	}
	d.do(t, "PATCH", "/service/web/env", `{"A":"`+big+`<<<<`+big+`"}`).want(t, 413, "65536 bytes")
}

func TestDamagedRecordIsAnErrorAndCostsNothing(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "{", `{"params":{"id":"other"},"revision":"x"}`, "null"} {
		e, d := startWithService(t)
		before := state(t, e, d)
		name := filepath.Join(d.binds, recordDir, "web")
		good, err := os.ReadFile(name)
		if err = errors.Join(err, os.WriteFile(name, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
		for _, request := range []struct{ method, path, body string }{
			{"POST", "/service/web/ctl", `{"op":"start"}`}, {"PATCH", "/service/web/env", "{}"},
			{"POST", "/service", createBodyJSON("web", "")}, {"GET", "/service/web/params", ""},
		} {
			d.do(t, request.method, request.path, request.body).want(t, 500, "internal")
		}
		if !strings.Contains(d.log.String(), "the record is damaged") {
			t.Errorf("the log: %s", d.log)
		}
		if err := os.WriteFile(name, good, 0o600); err != nil {
			t.Fatal(err)
		}
		if after := state(t, e, d); after != before {
			t.Errorf("before%s\nafter%s", before, after)
		}
		d.do(t, "DELETE", "/service/web", "").want(t, 204)
	}
}

func crowdRuns(e *fakeEngine, id string) bool {
	c, _ := e.container(id)
	return c.Running
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
func TestCrowdLeavesAConsistentEnd(t *testing.T) {
	t.Parallel()
	source := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) { w.Write(tgz(file("hello", "world"))) })
	d, e := startFetching(t, "127.0.0.0/8")
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
	if got := e.names(); !slices.Equal(got, want) {
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
		{"POST", "/service/web/ctl", `{"op":"restart"}`, "POST /containers/create", 200},
		{"POST", "/service/web/ctl", `{"op":"restart"}`, "DELETE /containers/", 200},
		{"DELETE", "/service/web", "", "DELETE /containers/", 404}, // marked
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
		waitFor(t, "each read has asked the engine", func() bool { return len(e.calls()[before:]) >= len(reads) })
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

func TestWaiterThatGivesUpLeavesTheQueue(t *testing.T) {
	t.Parallel()
	locks := newKeyedMutex()
	unlock, err := locks.lock(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := locks.lock(gone, "web"); err != errBusy {
		t.Errorf("a waiter that gives up gets %v", err)
	}
	unlock()
	if len(locks.slots) > 0 {
		t.Errorf("%d mutexes are left", len(locks.slots))
	}
}
