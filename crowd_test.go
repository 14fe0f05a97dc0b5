package main

import (
	"encoding/json"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/docker/docker/api/types/container"
)

// crowdHold has the engine hold each call that matches until release is called or its
// client leaves. One arrives on held for each.
func crowdHold(e *fakeEngine, matches func(call string) bool) (held <-chan struct{}, release func()) {
	arrived, free := make(chan struct{}, 1000), make(chan struct{})
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !matches(r.Method + " " + versionPrefix.ReplaceAllString(r.URL.RequestURI(), "")) {
			return false
		}
		arrived <- struct{}{}
		select {
		case <-free:
			return false
		case <-r.Context().Done():
			return true
		}
	})
	return arrived, sync.OnceFunc(func() { close(free) })
}

// crowdSend sends a request in the background.
func crowdSend(t *testing.T, d *daemon, method, path, body string) <-chan answer {
	answers := make(chan answer, 1)
	go func() {
		defer close(answers)
		answers <- d.do(t, method, path, body)
	}()
	return answers
}

func crowdRuns(e *fakeEngine, id string) bool {
	c, _ := e.container(id)
	return c.Running
}

func crowdDescriptors() int {
	open, _ := os.ReadDir("/proc/self/fd")
	return len(open)
}

// crowdLeavesNothing runs f, which stops all that it starts, and waits until there are
// as few goroutines and descriptors as before. A test that uses it is not parallel.
func crowdLeavesNothing(t *testing.T, f func()) {
	t.Helper()
	goroutines, descriptors := runtime.NumGoroutine(), crowdDescriptors()
	f()
	defer func() {
		if t.Failed() {
			stacks := make([]byte, 1<<20)
			t.Logf("%d goroutines, then %d; %d descriptors, then %d\n%s", goroutines, runtime.NumGoroutine(),
				descriptors, crowdDescriptors(), stacks[:runtime.Stack(stacks, true)])
		}
	}()
	waitFor(t, "goroutines and descriptors as before", func() bool {
		return runtime.NumGoroutine() <= goroutines && crowdDescriptors() <= descriptors
	})
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
