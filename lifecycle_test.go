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
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
)

func TestContainersWithoutANameAreNoServices(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), nil)
	e.answerWith("/containers/json", 200,
		`[{"Id":"1","Names":[""],"Labels":{"duxcore.service":"web"}},`+
			`{"Id":"2","Labels":{"duxcore.service":"a/b"}}]`)
	if a := d.do(t, "GET", "/service", "").want(t, 200); strings.TrimSpace(a.body) != "[]" {
		t.Errorf("services: %s", a.body)
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
	must(t, os.Mkdir(filepath.Join(d.binds, "78"), 0o700))
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
	d.do(t, "PUT", "/service/web", createBodyJSON("web",
		`"image":"img:2","max_ram":67108864,"env":["A=1"]`)).want(t, 204)
	d.do(t, "PATCH", "/service/web/env", `{"B":"2"}`).want(t, 204) // of what is pending
	// The PUT has looked at its image twice, before and after the wait for the lock; the PATCH asks for nothing.
	if asked := e.calls()[calls:]; len(asked) != 2 || countCalls(asked, "GET /images/") != 2 {
		t.Errorf("the engine was asked %q", asked)
	}
	d.do(t, "GET", "/service/web/params", "").want(t, 200,
		`{"params":{"id":"web","image":"img:1","bind_dir":"/data"},`,
		`"pending":{"id":"web","image":"img:2","bind_dir":"/data","env":["B=2"],"max_ram":67108864}}`)
	d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
	after, _ := e.container("web")
	if after.HostConfig.Memory != 64<<20 || after.imageID == before.imageID || after.volume != before.volume ||
		!after.Running {
		t.Errorf("before %+v\nafter %+v", before, after)
	}
	if a := d.do(t, "GET", "/service/web/params", "").want(t, 200, `"image":"img:2"`); strings.Contains(a.body,
		"pending") {
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
	held, release := crowdHold(e, func(call string) bool {
		return strings.HasPrefix(call, "POST /images/create")
	})
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
	put := crowdSend(t, d, "PUT", "/service/web", createBodyJSON("web",
		fmt.Sprintf(`"cmd":["/x"],"image":%q`, id)))
	waitFor(t, "the PUT has looked at its image", func() bool {
		return countCalls(e.calls()[before:], "GET /images/"+id) > 0
	})
	d.do(t, "DELETE", "/docker/image/"+id, "").want(t, 204)
	release()
	(<-started).want(t, 204)
	(<-put).want(t, 404, "no_such_image")
}

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
	for _, text := range []string{"", "{", `{"params":{"id":"other"},"revision":"x"}`, "null",
		`{"params":{"id":"web"}}`, `{"params":{"id":"other"},"revision":"x","pending":{"params":{"id":"web"}}}`} {
		e, d := startWithService(t)
		before := state(t, e, d)
		name := filepath.Join(d.binds, recordDir, "web")
		good, err := os.ReadFile(name)
		must(t, errors.Join(err, os.WriteFile(name, []byte(text), 0o600)))
		for _, request := range []struct{ method, path, body string }{
			{"POST", "/service/web/ctl", `{"op":"start"}`}, {"PATCH", "/service/web/env", "{}"},
			{"POST", "/service", createBodyJSON("web", "")}, {"GET", "/service/web/params", ""},
		} {
			d.do(t, request.method, request.path, request.body).want(t, 500, "internal")
		}
		if !strings.Contains(d.log.String(), "the record is damaged") {
			t.Errorf("the log: %s", d.log)
		}
		must(t, os.WriteFile(name, good, 0o600))
		wantState(t, e, d, before)
		d.do(t, "DELETE", "/service/web", "").want(t, 204)
	}
}

func crowdRuns(e *fakeEngine, id string) bool {
	c, _ := e.container(id)
	return c.Running
}

func TestOneOfTenCreatesOfOneIDWins(t *testing.T) {
	t.Parallel()
	e, d := start(t, nil)
	held, release := crowdHold(e, func(call string) bool {
		return strings.HasPrefix(call, "POST /containers/create")
	})
	var answers []<-chan answer
	for i := range 10 {
		answers = append(answers, crowdSend(t, d, "POST", "/service",
			createBodyJSON("web", fmt.Sprintf(`"env":["N=%d"]`, i))))
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
	source := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		w.Write(tgz(file("hello", "world")))
	})
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
	requests := []struct{ method, path, body string }{ // of a service named ID
		{"POST", "/service", createBodyJSON("ID", "")}, {"POST", "/service", createBodyJSON("ID", contents)},
		{"POST", "/service", createBodyJSON("ID", contents)}, {"POST", "/service/ID/ctl", `{"op":"start"}`},
		{"POST", "/service/ID/ctl", `{"op":"start"}`}, {"POST", "/service/ID/ctl", `{"op":"stop"}`},
		{"POST", "/service/ID/ctl", `{"op":"restart"}`}, {"POST", "/service/ID/ctl", `{"op":"kill"}`},
		{"PATCH", "/service/ID/env", `{"A":"1"}`}, {"DELETE", "/service/ID", ""}, {"GET", "/service/ID", ""},
		{"GET", "/service", ""}, {"GET", "/service/ID/stats", ""},
	}
	for turn := range 10 {
		r, fill := requests[(client+turn)%len(requests)], strings.NewReplacer("ID", ids[random.IntN(len(ids))])
		a := d.do(t, r.method, fill.Replace(r.path), fill.Replace(r.body))
		if !slices.Contains([]int{200, 201, 204, 404, 409}, a.status) {
			t.Errorf("%s %s %s: %d %s", r.method, r.path, r.body, a.status, a.body)
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
	if err := json.Unmarshal([]byte(d.do(t, "GET", "/service", "").want(t, 200).body), &list); err != nil ||
		len(list) != len(want) {
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
	slow := crowdSend(t, d, "POST", "/service", createBodyJSON("slow",
		fmt.Sprintf(`"bind_contents":%q`, source.URL)))
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
	e.wantNames(t, "slow")
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

func TestWaiterThatGivesUpLeavesTheQueue(t *testing.T) {
	t.Parallel()
	locks := newKeyedMutex()
	unlock, err := locks.lock(t.Context(), "web")
	must(t, err)
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

func TestRestartThatFailsLeavesTheServiceRunning(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, nil)
	d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
	before := state(t, e, d)
	e.answerWith("/containers/create", 500, `{"message":"no space left"}`)
	d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 502)
	wantState(t, e, d, before)
	d.do(t, "GET", "/service/web/params", "").want(t, 200, `"pending":`) // nothing was committed
	e.setIntercept(nil)
	d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
	d.do(t, "GET", "/service/web", "").want(t, 200, "A=1")
}

// Otherwise a restart that has waited could end after its stop and before its start.
func TestOperationHasItsWholeTimeAfterTheWaitForTheLock(t *testing.T) {
	t.Parallel()
	_, s := bareService(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience/2)
	defer cancel()
	must(t, s.services.change(ctx, "web", func(ctx context.Context, _ service) error {
		deadline, _ := ctx.Deadline()
		if left := time.Until(deadline); left < s.stopTimeout {
			t.Errorf("%v are left for a stop of %v", left, s.stopTimeout)
		}
		return nil
	}))
}

func TestCreateIsUndoneWhenItsClientLeaves(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"GET /images/", "POST /containers/create", "the download"} {
		downloading := make(chan struct{}, 1)
		source := serveOn(t, "127.0.0.1", func(_ http.ResponseWriter, r *http.Request) {
			downloading <- struct{}{}
			<-r.Context().Done() // the daemon has given it up
		})
		d, e := startFetching(t, "127.0.0.0/8")
		held, release := crowdHold(e, func(call string) bool { return strings.HasPrefix(call, at) })
		ctx, leave := context.WithCancel(t.Context())
		go func() { // ends when the request has come so far
			select {
			case <-held:
			case <-downloading:
			}
			leave()
			release()
		}()
		d.abandon(t, ctx, "POST", "/service", createBodyJSON("web", fmt.Sprintf(`"bind_contents":%q`, source.URL)))
		wantNothing(t, d, e)
	}
}

// abandon sends a request whose client leaves when ctx ends, and returns when the daemon is done with it.
func (d *daemon) abandon(t *testing.T, ctx context.Context, method, path, body string) {
	t.Helper()
	r := d.request(t, method, path, strings.NewReader(body)).WithContext(ctx)
	r.Header.Set("X-Request-Id", "abandoned")
	if answer, err := d.client.Do(r); err == nil {
		answer.Body.Close()
		t.Errorf("%s %s was answered", method, path)
	}
	if !pollFor(patience/2, func() bool { return strings.Contains(d.log.String(), "=abandoned") }) {
		t.Fatalf("the daemon goes on with %s %s", method, path)
	}
}

func TestOtherChangesFinishWhenTheirClientLeaves(t *testing.T) {
	t.Parallel()
	const params = `{"id":"web","image":"img:1","bind_dir":"/data","env":["A=1"]}`
	for _, test := range []struct {
		method, path, body, at string
		status                 int // of a GET of its parameters afterwards
		text                   string
	}{
		{"PUT", "/service/web", createBodyJSON("web", `"env":["A=2"]`), "GET /images/", 200, `"A=2"`},
		{"POST", "/service/web/ctl", `{"op":"restart"}`, "GET /containers/json", 200, `"params":` + params},
		{"POST", "/service/web/ctl", `{"op":"start"}`, "GET /containers/json", 200, `"pending":` + params},
		{"DELETE", "/service/web", "", "GET /containers/json", 404, ""},
	} {
		e, d := startWithRunning(t, nil)
		d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
		held, release := crowdHold(e, func(call string) bool { return strings.HasPrefix(call, test.at) })
		ctx, leave := context.WithCancel(t.Context())
		go func() { // ends when the request has come so far
			<-held
			leave()
			time.Sleep(100 * time.Millisecond) // for the daemon to see it
			release()
		}()
		d.abandon(t, ctx, test.method, test.path, test.body)
		d.do(t, "GET", "/service/web/params", "").want(t, test.status, test.text)
		if crowdRuns(e, "web") != (test.status == 200) {
			t.Errorf("after %s %s: running is %v", test.method, test.body, crowdRuns(e, "web"))
		}
	}
}

func TestCreateWhoseClientLeavesBeforeTheCommitIsUndone(t *testing.T) {
	t.Parallel()
	e, s := bareService(t)
	ctx, leave := context.WithCancel(t.Context())
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/rename") {
			leave()
		}
		return false
	})
	err := s.services.create(ctx, serviceParams{ID: "new", Image: "img:1", BindDir: "/data"}, "")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the error is %v", err)
	}
	if names, dirs := e.names(), bindDirs(t, s.binds.path); len(names) != 1 || len(dirs) != 1 {
		t.Errorf("there are %q and %q", names, dirs)
	}
}
