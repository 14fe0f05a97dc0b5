package main

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

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

// settled says in other words than the code what the table makes of a state. It is not ok if there is an
// error.
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
			if err != nil || svc.containerID != c.ID || svc.running != c.Running ||
				c.Labels[labelRevision] != record.Revision {
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
		e.byName(name).Running = running
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
			return serviceSpec{serviceParams{ID: "web", Image: "img:1", BindDir: "/data", Env: []string{env}}, image,
				""}
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
	must(t, err)
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
	must(t, err)
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

// halfDone has the engine hold what a create that was killed has left of a service.
func halfDone(e *fakeEngine, binds, id string) (containerID string) {
	return e.addForeign(candidatePrefix+id, map[string]string{labelService: id, labelBinds: binds},
		filepath.Join(binds, id))
}

// A container that was given another name may still run and use the directory.
func TestServiceRenamedByHandIsAConflictAndKeepsItsData(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	data := filepath.Join(d.binds, "web", "data")
	must(t, os.WriteFile(data, []byte("precious"), 0o600))
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
	e.addForeign("web", map[string]string{labelService: "web", labelBinds: d.binds},
		filepath.Join(d.binds, "web"))
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
	must(t, d.stop())
	d = startDaemon(t, e.host(), func(c *config) { c.binds = d.binds })
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 409)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 409)
	e.setIntercept(nil)
	d.do(t, "POST", "/service/web/ctl", `{"op":"stop"}`).want(t, 204)
	wantState(t, e, d, before)
}

// Nor does it put in force what is pending, which would stop a running service in the next round.
func TestEngineThatListsNothingForAMomentStopsNoService(t *testing.T) {
	t.Parallel()
	e, server := bareService(t)
	s := server.services
	err := errors.Join(s.change(t.Context(), "web", s.start), s.setEnv(t.Context(), "web", []string{"A=1"}))
	must(t, err)
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

// A service whose settling hangs keeps the next ones waiting until its own deadline, and no longer.
func TestHungCallOfARoundEndsAtItsDeadline(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	s := bareServer(t, e, func(c *config) { c.timeouts.settle = haste() / 2 }).services
	hung := halfDone(e, s.binds.path, "hangs")
	halfDone(e, s.binds.path, "later")
	_, release := crowdHold(e, func(call string) bool {
		return strings.Contains(call, "DELETE /containers/"+hung)
	})
	defer release()
	if err := s.settleAll(t.Context()); err != nil {
		t.Error(err)
	}
	e.wantNames(t, candidatePrefix+"hangs")
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
	must(t, os.MkdirAll(filepath.Join(binds, recordDir), 0o700))
	hung := halfDone(e, binds, "hangs")
	_, release := crowdHold(e, func(call string) bool {
		return strings.Contains(call, "DELETE /containers/"+hung)
	})
	d := startDaemon(t, e.host(), func(c *config) {
		c.binds, c.timeouts.settleInterval = binds, 100*time.Millisecond
	})
	d.do(t, "GET", "/health", "").want(t, 204)
	release()
	waitFor(t, "the hung call", func() bool { return len(e.names()) == 0 && len(bindDirs(t, d.binds)) == 0 })
}

// An engine whose socket is there but that does not answer yet is asked again within seconds.
func TestEngineThatStartsAfterTheDaemonIsFoundSoon(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	must(t, d.stop())
	e.prune()
	e.close()
	d = startDaemon(t, e.host(), func(c *config) { c.binds = d.binds })
	e.reopen()
	waitFor(t, "the service has its container again", func() bool {
		return slices.Equal(e.names(), []string{"web"})
	})
}

// The container that a late call of a dead daemon makes takes a name. That makes one request fail, and the
// next settle removes it.
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
	e.wantNames(t, "other", "web")
}

// docker start $(docker ps -aq) after a reboot starts whatever an operation that was killed has left.
func TestCandidateThatWasStartedByHandDoesNotStay(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
	e.wantNames(t, "web")
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
	extra := `"env":["A=<&>"],"max_ram":67108864,"max_cpu":50000,"port_map":{"80/tcp":{"HostPort":"8080"}},` +
		`"cmd":["x"],"user":"1000:5"`
	d.do(t, "POST", "/service", createBodyJSON("full", extra)).want(t, 201)
	before, _ := e.container("full")
	must(t, d.stop())
	machine := newFakeEngine(t)
	machine.images = e.images
	startDaemon(t, machine.host(), func(c *config) { c.binds = d.binds })
	after, ok := machine.container("full")
	if !ok || !reflect.DeepEqual(after.Config, before.Config) ||
		!reflect.DeepEqual(after.HostConfig, before.HostConfig) {
		t.Errorf("before %+v %+v\nafter %+v %+v", before.Config, before.HostConfig, after.Config, after.HostConfig)
	}
	machine.wantNames(t, "full", "web")
}
