//go:build integration

package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/docker/docker/api/types/image"
)

var (
	deathRounds = flag.Int("death-rounds", 1, "how often the daemon dies at each engine call of each operation")
	deathRandom = flag.Int("death-random", 8, "how often it dies at a random moment, a third of them twice")
	deathSeed   = flag.Uint64("death-seed", uint64(time.Now().UnixNano()), "seed of the random moments")
)

const (
	deathWorkers = 3
	// settleWait is for an engine call of a dead daemon that took effect after its
	// successor settled: that one looks again once a minute.
	settleWait = 80 * time.Second
)

// TestServicesSurviveDeathOfTheDaemon kills the daemon before, in and after each engine
// call of each operation that changes a service, and at random moments. Its successor
// must find the service as it was or as it was to be, and nothing half-made.
func TestServicesSurviveDeathOfTheDaemon(t *testing.T) {
	t.Parallel()
	t.Logf("-death-seed %d", *deathSeed)
	rng := mathrand.New(mathrand.NewPCG(*deathSeed, 0))
	deaths, late := plannedDeaths(t, rng)
	tally := &deathTally{by: map[string]int{}}
	queue := make(chan plannedDeath, len(deaths))
	for _, d := range deaths {
		queue <- d
	}
	close(queue)
	var workers sync.WaitGroup
	for range deathWorkers {
		workers.Go(func() {
			t.Run("worker", func(t *testing.T) {
				w := newDeathWorld(t)
				for d := range queue {
					if !t.Run(d.String(), func(t *testing.T) { w.die(t, d, tally) }) {
						w = newDeathWorld(t) // the old one is in an unknown state
					}
				}
				w.wantState(t, "at the end", "", deathState{})
			})
		})
	}
	for _, d := range late { // these mostly wait, so they do it all at once
		workers.Go(func() {
			t.Run(d.String(), func(t *testing.T) { newDeathWorld(t).die(t, d, tally) })
		})
	}
	workers.Wait()
	t.Log(tally)
}

// importCalls are the engine calls of an import.
var importCalls = []string{"import", "question before the sync of the image", "tag",
	"question before the sync of the tag", "removal of the import's name"}

const importTagCall = 2

// TestImportsSurviveDeathOfTheDaemon kills the daemon before, in and after each engine call of an
// import, and at random moments. When its successor has settled, the engine has the image with its own
// tag and no other, or nothing of it.
func TestImportsSurviveDeathOfTheDaemon(t *testing.T) {
	t.Parallel()
	t.Logf("-death-seed %d", *deathSeed)
	rng := mathrand.New(mathrand.NewPCG(*deathSeed, 1))
	var deaths []plannedDeath
	for call, name := range importCalls {
		for _, side := range []string{dieBefore, dieAfter, dieDuring, dieLate} {
			deaths = append(deaths, plannedDeath{call: call, name: name, side: side,
				delay: randomDelay(rng, 20*time.Millisecond)})
		}
	}
	for range *deathRandom {
		deaths = append(deaths, plannedDeath{call: -1, side: dieAtRandom,
			delay: randomDelay(rng, 300*time.Millisecond)})
	}
	var all sync.WaitGroup
	for _, d := range deaths { // these mostly wait, so they do it all at once
		all.Go(func() {
			t.Run(fmt.Sprintf("%s %s %v", d.side, d.name, d.delay), func(t *testing.T) {
				newDeathWorld(t).dieInImport(t, d)
			})
		})
	}
	all.Wait()
}

func (w *deathWorld) dieInImport(t *testing.T, d plannedDeath) {
	upload := deathRequest{"POST", "/docker/image",
		string(archiveOf(imageFile(w.marker+"-import", strings.Repeat("x", 1<<20))))}
	release := w.plan(d)
	w.send(context.Background(), upload)
	w.daemon.kill() // one at random may have been too late
	w.daemon.wait(20 * time.Second)
	w.proxy.setHook(nil)
	w.start(t)
	release()
	found := func() (images []image.Summary) {
		for _, img := range allImages(t, w.engine) {
			saved, err := w.engine.ImageSave(context.Background(), []string{img.ID})
			if err != nil { // another test's, and gone meanwhile
				continue
			}
			text, err := inLayers(saved)
			saved.Close()
			if err == nil && strings.Contains(text, w.marker+"-import") {
				images = append(images, img)
			}
		}
		return images
	}
	tagged := d.call > importTagCall || d.call == importTagCall && d.side == dieAfter
	good := func(images []image.Summary) bool {
		return len(images) == 0 && !tagged || len(images) == 1 && slices.Equal(images[0].RepoTags,
			[]string{"duxcore/import:" + images[0].ID[len("sha256:"):][:12]})
	}
	// What the engine was at when the daemon died may be there only when the successor has looked: it
	// looks again after a minute.
	looked := make(chan struct{}, 10)
	w.proxy.setHook(func(r *http.Request) (*http.Response, error) {
		if strings.HasSuffix(r.URL.Path, "/images/json") {
			looked <- struct{}{}
		}
		return w.proxy.transport.RoundTrip(r)
	})
	deadline := time.After(settleWait)
	select {
	case <-looked:
	case <-deadline:
		t.Fatalf("the successor does not look\n%s", w.daemon.log)
	}
	images := found()
	for deadline = time.After(settleWait); !good(images); images = found() {
		select {
		case <-time.After(100 * time.Millisecond):
		case <-deadline:
			t.Fatalf("the engine has the images %+v\n%s", images, w.daemon.log)
		}
	}
	for _, img := range images {
		if _, err := w.engine.ImageRemove(context.Background(), img.ID,
			image.RemoveOptions{Force: true}); err != nil {
			t.Error(err)
		}
	}
}

// plannedDeath is a moment at which the daemon dies. All its random parts are chosen
// when it is planned, so that the seed repeats it.
type plannedDeath struct {
	number int
	op     *deathOp
	call   int    // which engine call of the operation
	name   string // that call
	side   string
	delay  time.Duration // for during and random
	then   string        // what the client does when the successor listens
	second *plannedDeath // of the successor, while it settles; nil for none
}

// The sides of an engine call on which the daemon dies, and other moments.
const (
	dieBefore   = "before"          // the engine never sees the call
	dieAfter    = "after"           // the engine has answered, the daemon has not read it
	dieDuring   = "during"          // the engine works on it
	dieLate     = "late"            // the engine sees it when the successor serves already
	dieDownload = "during download" // half of bind_contents was sent
	dieAtRandom = "at random"
)

const (
	thenLook   = ""              // it waits until the service is settled, and sends the same request again
	thenAgain  = ", then again"  // it sends the same request again at once
	thenDelete = ", then DELETE" // it deletes the service at once
)

var deathThens = []string{thenLook, thenAgain, thenDelete}

func (d plannedDeath) String() string {
	text := fmt.Sprintf("%d %s: %s %s", d.number, d.op.name, d.side, d.name)
	if d.delay > 0 {
		text += " " + d.delay.String()
	}
	if d.second != nil {
		text += fmt.Sprintf(" and again %s call %d of the successor", d.second.side, d.second.call)
	}
	return text + d.then
}

// plannedDeaths does each operation once, undisturbed, and places deaths around the
// engine calls that it sees.
func plannedDeaths(t *testing.T, rng *mathrand.Rand) (deaths, lateDeaths []plannedDeath) {
	w := newDeathWorld(t)
	number := 0
	add := func(list *[]plannedDeath, d plannedDeath) {
		number++
		d.number = number
		*list = append(*list, d)
	}
	took := map[*deathOp]time.Duration{}
	for _, op := range deathOps {
		calls, total := w.rehearse(t, op)
		took[op] = total
		t.Logf("%s takes %v: %v", op.name, total, calls)
		for round := range *deathRounds {
			for i, c := range calls {
				changes := !strings.HasPrefix(c.name, "GET ")
				add(&deaths, plannedDeath{op: op, call: i, name: c.name, side: dieBefore})
				add(&deaths, plannedDeath{op: op, call: i, name: c.name, side: dieAfter})
				if changes {
					add(&deaths, plannedDeath{op: op, call: i, name: c.name, side: dieDuring,
						delay: randomDelay(rng, c.took), then: deathThens[rng.IntN(3)]})
				}
				if changes && round == 0 {
					add(&lateDeaths, plannedDeath{op: op, call: i, name: c.name, side: dieLate})
				}
			}
			if op.downloads {
				add(&deaths, plannedDeath{op: op, call: -1, side: dieDownload})
			}
		}
	}
	for i := range *deathRandom {
		op := deathOps[i%len(deathOps)]
		d := plannedDeath{op: op, call: -1, side: dieAtRandom, delay: randomDelay(rng, took[op]*11/10),
			then: deathThens[rng.IntN(3)]}
		if rng.IntN(3) == 0 {
			d.second = &plannedDeath{call: rng.IntN(6), side: []string{dieBefore, dieAfter}[rng.IntN(2)],
				name: "while settling"}
		}
		add(&deaths, d)
	}
	return deaths, lateDeaths
}

func randomDelay(rng *mathrand.Rand, below time.Duration) time.Duration {
	return time.Duration(rng.Int64N(int64(below) + 1)).Round(time.Microsecond)
}

// deathOp is a request that changes a service, and the only two states that it and the
// death of the daemon may leave.
type deathOp struct {
	name      string
	prepare   []deathRequest
	request   deathRequest
	status    int
	repeated  int // the status of the same request when it was carried out already
	downloads bool
	old, new  deathState // without volumes
	runsAfter bool
}

var deathOps = []*deathOp{
	{name: "create", request: deathCreate, status: 201, repeated: 409, downloads: true,
		new: deathState{current: "old", files: "all"}},
	{name: "PUT", prepare: []deathRequest{deathCreate, deathStart},
		request: deathPut, status: 204, repeated: 204, runsAfter: true,
		old: deathState{current: "old", files: "all"},
		new: deathState{current: "old", next: "pending", files: "all"}},
	{name: "PATCH", prepare: []deathRequest{deathCreate, deathStart, deathPut},
		request: deathPatch, status: 204, repeated: 204, runsAfter: true,
		old: deathState{current: "old", next: "pending", files: "all"},
		new: deathState{current: "old", next: "new", files: "all"}},
	{name: "restart", prepare: []deathRequest{deathCreate, deathStart, deathPatch},
		request: deathRestart, status: 204, repeated: 204, runsAfter: true,
		old: deathState{current: "old", next: "new", files: "all"},
		new: deathState{current: "new", files: "all"}},
	{name: "start", prepare: []deathRequest{deathCreate, deathPatch},
		request: deathStart, status: 204, repeated: 204, runsAfter: true,
		old: deathState{current: "old", next: "new", files: "all"},
		new: deathState{current: "new", files: "all"}},
	{name: "DELETE", prepare: []deathRequest{deathCreate, deathStart, deathPatch},
		request: deathDelete, status: 204, repeated: 404,
		old: deathState{current: "old", next: "new", files: "all"}},
}

// die prepares a service, has the daemon killed while it works on op's request, starts
// another one, and checks what that made of it.
func (w *deathWorld) die(t *testing.T, d plannedDeath, tally *deathTally) {
	w.begin(t, d.op)
	volumes := w.look(t).volumes
	release := w.plan(d)
	answer := w.send(context.Background(), d.op.request)
	if !w.daemon.wait(20 * time.Second) {
		t.Fatalf("the daemon did not die: it made fewer engine calls, and answered %+v", answer)
	}
	w.proxy.setHook(nil)
	w.onDownload.Store(nil)
	tally.add(d)
	if d.second != nil {
		w.dieWhileSettling(t, *d.second)
		tally.add(*d.second)
	}
	w.start(t)
	release()

	op := d.op
	allowed := []deathState{op.new}
	if answer.status != op.status { // it was not acknowledged
		allowed = append(allowed, op.old)
	}
	first, looked := w.look(t), time.Now()
	if d.then == thenDelete {
		if answer := w.sendAgain(deathDelete); answer.status != 204 && answer.status != 404 {
			t.Fatalf("DELETE: %+v; before it: %+v\n%s", answer, first, w.daemon.log)
		}
		w.wantState(t, "after it was deleted", "", deathState{})
		return
	}
	want := []int{op.status, op.repeated}
	if d.then == thenLook {
		want = []int{op.status}
		if s := w.wantState(t, "after the death", volumes, allowed...); s.isOneOf([]deathState{op.new}, volumes) {
			want = []int{op.repeated}
		}
	}
	if !first.isOneOf(allowed, volumes) {
		tally.lateEffect(d, first, time.Since(looked))
	}
	if again := w.sendAgain(op.request); !slices.Contains(want, again.status) {
		t.Fatalf("the same request again: %+v, want %v; before it: %+v\n%s", again, want, first, w.daemon.log)
	}
	w.wantState(t, "after the same request again", volumes, op.new)
	if op.runsAfter && !w.running(t) {
		t.Error("the service does not run after the same request again")
	}
	if op.new != (deathState{}) {
		w.mustSend(t, deathDelete, http.StatusNoContent)
		w.wantState(t, "after it was deleted", "", deathState{})
	}
}

// plan arranges for the death. What it returns lets a late call go, if there is one.
func (w *deathWorld) plan(d plannedDeath) (release func()) {
	daemon := w.daemon
	switch d.side {
	case dieDownload:
		die := func(*http.Request) { daemon.kill() }
		w.onDownload.Store(&die)
	case dieAtRandom:
		time.AfterFunc(d.delay, daemon.kill)
	default:
		return w.proxy.dieAt(daemon, d)
	}
	return func() {}
}

// dieWhileSettling starts a successor that dies too, at the latest when it listens.
func (w *deathWorld) dieWhileSettling(t *testing.T, d plannedDeath) {
	w.spawn(t)
	w.proxy.dieAt(w.daemon, d)
	poll(func() bool { return w.daemon.log.url() != "" || w.daemon.wait(0) })
	w.daemon.kill()
	w.proxy.setHook(nil)
}

// deathCall is an engine call of an operation.
type deathCall struct {
	name string
	took time.Duration
}

var deathCallNames = []struct {
	old *regexp.Regexp
	new string
}{{regexp.MustCompile(`^/v[0-9.]+`), ""}, {regexp.MustCompile(`/[0-9a-f]{64}`), "/*"},
	{regexp.MustCompile(`/images/.*/`), "/images/*/"}}

func deathCallName(r *http.Request, id string) string {
	path := strings.ReplaceAll(r.URL.Path, id, "<id>")
	for _, n := range deathCallNames {
		path = n.old.ReplaceAllString(path, n.new)
	}
	return r.Method + " " + path
}

// rehearse does an operation undisturbed, and returns its engine calls.
func (w *deathWorld) rehearse(t *testing.T, op *deathOp) (calls []deathCall, total time.Duration) {
	w.begin(t, op)
	var mu sync.Mutex
	w.proxy.setHook(func(r *http.Request) (*http.Response, error) {
		if ofRound(r) {
			return w.proxy.transport.RoundTrip(r)
		}
		start := time.Now()
		answer, err := w.proxy.transport.RoundTrip(r)
		mu.Lock()
		defer mu.Unlock()
		calls = append(calls, deathCall{deathCallName(r, w.id), time.Since(start)})
		return answer, err
	})
	start := time.Now()
	w.mustSend(t, op.request, op.status)
	total = time.Since(start)
	w.proxy.setHook(nil)
	if op.new != (deathState{}) {
		w.mustSend(t, deathDelete, http.StatusNoContent)
	}
	return calls, total
}

// deathTally counts what happened.
type deathTally struct {
	mu    sync.Mutex
	total int
	by    map[string]int // operation and side
	late  []string
}

func (y *deathTally) add(d plannedDeath) {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.total++
	y.by[d.side]++
	if d.op != nil {
		y.by[d.op.name]++
	}
}

// lateEffect notes a state that was not right when the successor listened.
func (y *deathTally) lateEffect(d plannedDeath, s deathState, took time.Duration) {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.late = append(y.late, fmt.Sprintf("%v: right after %v, was %+v", d, took.Round(time.Millisecond), s))
}

func (y *deathTally) String() string {
	return fmt.Sprintf("%d deaths %v; %d late effects:\n%s", y.total, y.by, len(y.late),
		strings.Join(y.late, "\n"))
}

var errDeathPlanned = errors.New("the daemon is dead")

// dieAt kills daemon at one of its next engine calls. It returns what a late call waits
// for; that waits until the engine has answered.
func (p *deathProxy) dieAt(daemon *deathDaemon, d plannedDeath) (release func()) {
	var calls atomic.Int64
	held := func() {}
	p.setHook(func(r *http.Request) (*http.Response, error) {
		if ofRound(r) || calls.Add(1)-1 != int64(d.call) {
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

// begin makes a service in the state that op starts from.
func (w *deathWorld) begin(t *testing.T, op *deathOp) {
	t.Helper()
	w.count++
	w.id = fmt.Sprintf("%s-%d", strings.ToLower(w.marker[7:15]), w.count)
	for _, r := range op.prepare {
		status := http.StatusNoContent
		if r == deathCreate {
			status = http.StatusCreated
		}
		w.mustSend(t, r, status)
	}
}

func TestCreateThatCannotGiveItsDirectoryAwayLeavesNothing(t *testing.T) {
	t.Parallel()
	w := newDeathWorld(t)
	w.daemon.kill()
	w.alone = true
	w.start(t)
	w.begin(t, deathOps[0])
	create := deathRequest{"POST", "/service",
		`{"type":"raw","params":{"id":"ID","image":"IMAGE","bind_dir":"/data","user":"1000"}}`}
	w.mustSend(t, create, http.StatusInternalServerError)
	waitFor(t, "its reason in the log", func() bool {
		return strings.Contains(w.daemon.log.String(), "invalid argument")
	})
	if got := w.look(t); got != (deathState{}) {
		t.Errorf("left %+v, want nothing", got)
	}
}
