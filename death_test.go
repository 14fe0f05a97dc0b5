//go:build integration

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/volume"
	"github.com/docker/docker/client"
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

// TestImportsSurviveDeathOfTheDaemon kills the daemon before, in and after each engine call of an
// import, and at random moments. When its successor has settled, the engine has the image with its own
// tag and no other, or nothing of it.
func TestImportsSurviveDeathOfTheDaemon(t *testing.T) {
	t.Parallel()
	t.Logf("-death-seed %d", *deathSeed)
	rng := mathrand.New(mathrand.NewPCG(*deathSeed, 1))
	calls := []string{"import", "tag", "removal of the import's name"}
	var deaths []plannedDeath
	for call, name := range calls {
		for _, side := range []string{dieBefore, dieAfter, dieDuring, dieLate} {
			deaths = append(deaths, plannedDeath{call: call, name: name, side: side, delay: randomDelay(rng, 20*time.Millisecond)})
		}
	}
	for range *deathRandom {
		deaths = append(deaths, plannedDeath{call: -1, side: dieAtRandom, delay: randomDelay(rng, 300*time.Millisecond)})
	}
	var all sync.WaitGroup
	for _, d := range deaths { // these mostly wait, so they do it all at once
		all.Go(func() {
			t.Run(fmt.Sprintf("%s %s %v", d.side, d.name, d.delay), func(t *testing.T) { newDeathWorld(t).dieInImport(t, d) })
		})
	}
	all.Wait()
}

func (w *deathWorld) dieInImport(t *testing.T, d plannedDeath) {
	upload := deathRequest{"POST", "/docker/image", string(imageOf(t, imageFile(w.marker+"-import", strings.Repeat("x", 1<<20))))}
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
	good := func(images []image.Summary) bool {
		return len(images) == 0 || len(images) == 1 && slices.Equal(images[0].RepoTags, []string{"duxcore/import:" + images[0].ID[len("sha256:"):][:12]})
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
	for ; !good(images); images = found() {
		select {
		case <-time.After(100 * time.Millisecond):
		case <-deadline:
			t.Fatalf("the engine has the images %+v\n%s", images, w.daemon.log)
		}
	}
	if tagged := d.side == dieAfter && d.call > 0; tagged && len(images) != 1 {
		t.Errorf("the image that has its tag is not found: %v", images)
	}
	for _, img := range images {
		if _, err := w.engine.ImageRemove(context.Background(), img.ID, image.RemoveOptions{Force: true}); err != nil {
			t.Error(err)
		}
	}
}

// The file of an upload has no name, so that the kernel removes it with the process.
func TestDeathInTheMiddleOfAnUploadLeavesNothing(t *testing.T) {
	t.Parallel()
	w := newDeathWorld(t)
	w.daemon.kill()
	if err := syscall.Mount("tmpfs", w.binds, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatalf("this test mounts a small file system, which takes root and CAP_SYS_ADMIN: %v", err)
	}
	t.Cleanup(func() {
		w.daemon.kill()
		if err := syscall.Unmount(w.binds, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	free := func() (blocks, inodes uint64) {
		var found syscall.Statfs_t
		if err := syscall.Statfs(w.binds, &found); err != nil {
			t.Fatal(err)
		}
		return found.Bfree * uint64(found.Bsize), found.Ffree
	}
	w.start(t)
	blocks, inodes := free()
	body, upload := io.Pipe()
	sent := make(chan struct{})
	go func() { // ends with the pipe
		defer close(sent)
		upload.Write(imageOf(t, imageFile("large", strings.Repeat("x", 8<<20)))[:4<<20])
	}()
	r, err := http.NewRequest("POST", w.daemon.url+"/docker/image", body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-Duxcore-CoreKey", w.key)
	answered := make(chan error, 1)
	go func() { // ends with the daemon
		_, err := http.DefaultClient.Do(r)
		answered <- err
	}()
	waitFor(t, "the upload's file to grow", func() bool { now, _ := free(); return now < blocks-2<<20 })
	w.daemon.kill()
	body.Close()
	<-sent
	if err := <-answered; err == nil {
		t.Error("a dead daemon answered")
	}
	waitFor(t, "the file to go", func() bool { b, i := free(); return b == blocks && i == inodes })
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
		d := plannedDeath{op: op, call: -1, side: dieAtRandom, delay: randomDelay(rng, took[op]*11/10), then: deathThens[rng.IntN(3)]}
		if rng.IntN(3) == 0 {
			d.second = &plannedDeath{call: rng.IntN(6), side: []string{dieBefore, dieAfter}[rng.IntN(2)], name: "while settling"}
		}
		add(&deaths, d)
	}
	return deaths, lateDeaths
}

func randomDelay(rng *mathrand.Rand, below time.Duration) time.Duration {
	return time.Duration(rng.Int64N(int64(below) + 1)).Round(time.Microsecond)
}

// deathState is all that there is of a world's one service. Strays are what should be there in no state: other
// containers, directories, marks, drafts of records, and whatever differs between the record and the container.
type deathState struct {
	current, next string // the variable A of the container, and of what is pending in the record
	files         string // in the bind directory: "all", empty without the directory, or what is wrong
	volumes       string // their names
	strays        string
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

type deathRequest struct{ method, path, body string }

var (
	deathCreate  = deathRequest{"POST", "/service", `{"type":"raw","params":{"id":"ID","image":"IMAGE","bind_dir":"/data","bind_contents":"CONTENTS","env":["A=old"]}}`}
	deathStart   = deathRequest{"POST", "/service/ID/ctl", `{"op":"start"}`}
	deathStop    = deathRequest{"POST", "/service/ID/ctl", `{"op":"stop"}`}
	deathRestart = deathRequest{"POST", "/service/ID/ctl", `{"op":"restart"}`}
	deathPut     = deathRequest{"PUT", "/service/ID", `{"type":"raw","params":{"id":"ID","image":"IMAGE","bind_dir":"/data","env":["A=pending"]}}`}
	deathPatch   = deathRequest{"PATCH", "/service/ID/env", `{"A":"new"}`}
	deathDelete  = deathRequest{"DELETE", "/service/ID", ""}
)

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

func deathOpNamed(name string) *deathOp {
	return deathOps[slices.IndexFunc(deathOps, func(op *deathOp) bool { return op.name == name })]
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
		if answer := w.send(context.Background(), deathDelete); answer.status != 204 && answer.status != 404 {
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
	if again := w.send(context.Background(), op.request); !slices.Contains(want, again.status) {
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
	select {
	case <-w.daemon.log.url:
	case <-w.daemon.exited:
	}
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
}{{regexp.MustCompile(`^/v[0-9.]+`), ""}, {regexp.MustCompile(`/[0-9a-f]{64}`), "/*"}, {regexp.MustCompile(`/images/.*/`), "/images/*/"}}

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
	return fmt.Sprintf("%d deaths %v; %d late effects:\n%s", y.total, y.by, len(y.late), strings.Join(y.late, "\n"))
}

// isOneOf ignores the volumes' names in allowed. A service has the volumes that it had
// before, or one if it had none, and nobody else has any.
func (s deathState) isOneOf(allowed []deathState, volumes string) bool {
	return slices.ContainsFunc(allowed, func(a deathState) bool {
		switch {
		case a == (deathState{}):
		case volumes != "":
			a.volumes = volumes
		case len(strings.Fields(s.volumes)) == 1:
			a.volumes = s.volumes
		}
		return s == a
	})
}

// deathProxy stands between the daemon and the engine.
type deathProxy struct {
	socket    string
	transport *http.Transport // to the engine
	hook      atomic.Pointer[deathHook]
}

// A deathHook takes the place of the round trip to the engine, for all calls but pings.
type deathHook func(r *http.Request) (*http.Response, error)

func newDeathProxy(t *testing.T, socket string, engine *client.Client) *deathProxy {
	t.Helper()
	dial := engine.Dialer()
	p := &deathProxy{socket: socket, transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) }}}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	quiet := log.New(io.Discard, "", 0)
	server := &http.Server{ErrorLog: quiet, Handler: &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", "engine" },
		Transport:     p,
		FlushInterval: -1,
		ErrorLog:      quiet,
		// The daemon must not see an answer that the engine did not give.
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}}
	go server.Serve(listener) // ends with Close
	t.Cleanup(func() { server.Close(); p.transport.CloseIdleConnections() })
	return p
}

func (p *deathProxy) setHook(hook deathHook) {
	if hook == nil {
		p.hook.Store(nil)
		return
	}
	p.hook.Store(&hook)
}

func (p *deathProxy) RoundTrip(r *http.Request) (*http.Response, error) {
	if hook := p.hook.Load(); hook != nil && !strings.HasSuffix(r.URL.Path, "/_ping") {
		return (*hook)(r)
	}
	return p.transport.RoundTrip(r)
}

var errDeathPlanned = errors.New("the daemon is dead")

// dieAt kills daemon at one of its next engine calls. It returns what a late call waits
// for; that waits until the engine has answered.
func (p *deathProxy) dieAt(daemon *deathDaemon, d plannedDeath) (release func()) {
	var calls atomic.Int64
	held := func() {}
	p.setHook(func(r *http.Request) (*http.Response, error) {
		if calls.Add(1)-1 != int64(d.call) {
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

// finish carries out a call whose answer nobody will see.
func (p *deathProxy) finish(r *http.Request) {
	if answer, err := p.transport.RoundTrip(r); err == nil {
		io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
	}
}

// deathWorld is one bind root with the real daemon as a process of its own, the real
// engine behind a proxy, an image with a volume, and a server of bind_contents.
type deathWorld struct {
	lastFrom                 atomic.Value // the address that the last request came from
	dir, binds, keyFile, key string
	engine                   *client.Client // past the proxy
	proxy                    *deathProxy
	contents                 *httptest.Server
	onDownload               atomic.Pointer[func(*http.Request)] // called when half of bind_contents was sent
	image, marker            string                              // each volume made of the image holds a file of this name
	daemon                   *deathDaemon
	alone                    bool   // the daemon is root in a user namespace without any other user
	id                       string // of the service of this moment
	count                    int
}

// newDeathWorld starts the first daemon. Nothing of the world outlives t.
func newDeathWorld(t *testing.T) *deathWorld {
	t.Helper()
	dir, err := os.MkdirTemp("", "duxcore-death-") // t.TempDir would be too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		t.Fatal(err)
	}
	engine, err := client.NewClientWithOpts(client.FromEnv, client.WithAPIVersionNegotiation())
	if err != nil {
		t.Fatal(err)
	}
	key := make([]byte, 32)
	rand.Read(key)
	w := &deathWorld{dir: dir, binds: filepath.Join(dir, "binds"), keyFile: filepath.Join(dir, "corekey.bin"),
		key: base64.StdEncoding.EncodeToString(key), engine: engine, marker: "marker-" + strings.ToLower(rand.Text())}
	if err := os.WriteFile(w.keyFile, key, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.destroy(t) })
	w.proxy = newDeathProxy(t, filepath.Join(dir, "engine.sock"), engine)
	w.contents = httptest.NewServer(http.HandlerFunc(w.serveContents))
	t.Cleanup(w.contents.Close)
	deathArchive() // or the first create would wait for it
	w.importImage(t)
	w.start(t)
	return w
}

// destroy leaves nothing of the world, whatever state it is in.
func (w *deathWorld) destroy(t *testing.T) {
	ctx := context.Background()
	if w.daemon != nil {
		w.daemon.kill()
	}
	for _, c := range w.containers(t) {
		if err := w.engine.ContainerRemove(ctx, c.ID, container.RemoveOptions{Force: true, RemoveVolumes: true}); err != nil {
			t.Error(err)
		}
	}
	for _, name := range w.volumes(t) {
		if err := w.engine.VolumeRemove(ctx, name, true); err != nil {
			t.Error(err)
		}
	}
	if w.image != "" {
		if _, err := w.engine.ImageRemove(ctx, w.image, image.RemoveOptions{Force: true}); err != nil {
			t.Error(err)
		}
	}
	if err := os.RemoveAll(w.dir); err != nil {
		t.Error(err)
	}
	w.engine.Close()
}

// importImage makes the image with the engine's own API: the daemon's has no VOLUME.
func (w *deathWorld) importImage(t *testing.T) {
	t.Helper()
	program, err := deathService()
	if err != nil {
		t.Fatal(err)
	}
	var root bytes.Buffer
	archive := tar.NewWriter(&root)
	for name, content := range map[string][]byte{"service": program, "vol/" + w.marker: []byte("here")} {
		if err := archive.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(content))}); err != nil {
			t.Fatal(err)
		}
		archive.Write(content)
	}
	if err := archive.Close(); err != nil {
		t.Fatal(err)
	}
	name := "duxcore-test/" + w.marker
	answer, err := w.engine.ImageImport(context.Background(), image.ImportSource{Source: &root, SourceName: "-"}, name,
		image.ImportOptions{Changes: []string{"VOLUME /vol", `CMD ["/service"]`}})
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Close()
	if _, err := lastStatus(answer); err != nil {
		t.Fatal(err)
	}
	w.image = name + ":latest"
}

// deathContents are the files of bind_contents. They unpack for long enough to die in it.
var deathContents = sync.OnceValue(func() map[string]string {
	files := map[string]string{}
	for i := range 60 {
		content := make([]byte, 16<<10)
		rand.Read(content)
		files[fmt.Sprintf("%d/%d/file", i%7, i)] = string(content)
	}
	return files
})

var deathArchive = sync.OnceValue(func() []byte {
	var zipped bytes.Buffer
	gz := gzip.NewWriter(&zipped)
	archive := tar.NewWriter(gz)
	for _, name := range slices.Sorted(maps.Keys(deathContents())) {
		content := deathContents()[name]
		archive.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))})
		archive.Write([]byte(content))
	}
	archive.Close()
	gz.Close()
	return zipped.Bytes()
})

func (w *deathWorld) serveContents(rw http.ResponseWriter, r *http.Request) {
	archive := deathArchive()
	half := len(archive) / 2
	rw.Write(archive[:half])
	http.NewResponseController(rw).Flush()
	if hook := w.onDownload.Load(); hook != nil {
		(*hook)(r)
	}
	rw.Write(archive[half:])
}

// request fills in what only this world knows.
func (w *deathWorld) request(ctx context.Context, r deathRequest) (*http.Request, error) {
	fill := strings.NewReplacer("ID", w.id, "IMAGE", w.image, "CONTENTS", w.contents.URL+"/contents.tar.gz").Replace
	request, err := http.NewRequestWithContext(ctx, r.method, w.daemon.url+fill(r.path), strings.NewReader(fill(r.body)))
	if err == nil {
		request.Header.Set("X-Duxcore-CoreKey", w.key)
	}
	return request, err
}

type deathAnswer struct {
	status int // 0 without an answer
	body   string
	err    error
}

// send sends a request once, whatever becomes of it.
func (w *deathWorld) send(ctx context.Context, r deathRequest) deathAnswer {
	request, err := w.request(ctx, r)
	if err != nil {
		return deathAnswer{err: err}
	}
	request = request.WithContext(httptrace.WithClientTrace(request.Context(), &httptrace.ClientTrace{
		GotConn: func(c httptrace.GotConnInfo) { w.lastFrom.Store(c.Conn.LocalAddr().String()) }}))
	once := http.Transport{DisableKeepAlives: true} // on a kept connection it would send some requests again
	answer, err := once.RoundTrip(request)
	if err != nil {
		return deathAnswer{err: err}
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		return deathAnswer{err: err}
	}
	return deathAnswer{answer.StatusCode, string(body), nil}
}

func (w *deathWorld) mustSend(t *testing.T, r deathRequest, status int) {
	t.Helper()
	if answer := w.send(context.Background(), r); answer.status != status {
		t.Fatalf("%s %s: %+v, want %d\n%s", r.method, r.path, answer, status, w.daemon.log)
	}
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

func (w *deathWorld) containers(t *testing.T) []container.Summary {
	t.Helper()
	list, err := w.engine.ContainerList(context.Background(), container.ListOptions{All: true,
		Filters: filters.NewArgs(filters.Arg("label", labelBinds+"="+w.binds))})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// volumes returns the names of the volumes that were made of the world's image. The
// engine keeps no other sign of whose an anonymous volume is.
func (w *deathWorld) volumes(t *testing.T) (names []string) {
	t.Helper()
	all, err := w.engine.VolumeList(context.Background(), volume.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range all.Volumes {
		if _, err := os.Stat(filepath.Join(v.Mountpoint, w.marker)); err == nil {
			names = append(names, v.Name)
		}
	}
	slices.Sort(names)
	return names
}

// look returns what there is, past the daemon.
func (w *deathWorld) look(t *testing.T) (s deathState) {
	t.Helper()
	var strays []string
	revision := ""
	for _, c := range w.containers(t) {
		name := strings.Join(c.Names, " ")
		full, err := w.engine.ContainerInspect(context.Background(), c.ID)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if name == "/"+w.id {
			s.current, revision = variableA(full.Config.Env), c.Labels[labelRevision]
		} else {
			strays = append(strays, name+" "+c.State)
		}
	}
	for _, name := range bindDirs(t, w.binds) {
		if name == w.id {
			s.files = lookAtFiles(filepath.Join(w.binds, w.id))
		} else {
			strays = append(strays, name)
		}
	}
	drafts, err := filepath.Glob(filepath.Join(w.binds, recordDir, "*"+draftSuffix))
	if err != nil {
		t.Fatal(err)
	}
	strays = append(strays, drafts...)
	record := w.record(t)
	if record.Revision != revision || variableA(record.Params.Env) != s.current {
		strays = append(strays, fmt.Sprintf("a record %q of A=%q beside a container %q", record.Revision, record.Params.Env, revision))
	}
	if record.Pending != nil {
		s.next = variableA(record.Pending.Params.Env)
	}
	s.volumes, s.strays = strings.Join(w.volumes(t), " "), strings.Join(strays, ", ")
	return s
}

// record returns the record of the service, or an empty one.
func (w *deathWorld) record(t *testing.T) (r serviceRecord) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(w.binds, recordDir, w.id))
	if errors.Is(err, fs.ErrNotExist) {
		return r
	}
	if err != nil {
		t.Fatal(err)
	}
	decode(t, string(text), &r)
	return r
}

func variableA(env []string) string {
	for _, v := range env {
		if value, ok := strings.CutPrefix(v, "A="); ok {
			return value
		}
	}
	return ""
}

// lookAtFiles compares a bind directory with bind_contents.
func lookAtFiles(dir string) string {
	want := deathContents()
	found := 0
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		content, err := os.ReadFile(path)
		if err == nil && string(content) != want[name] {
			err = fmt.Errorf("%s differs", name)
		}
		found++
		return err
	})
	if err != nil {
		return err.Error()
	}
	if found != len(want) {
		return fmt.Sprintf("%d of the files", found)
	}
	return "all"
}

// wantState waits until there is one of the allowed states, and returns it.
func (w *deathWorld) wantState(t *testing.T, when, volumes string, allowed ...deathState) (s deathState) {
	t.Helper()
	if !deathPoll(settleWait, func() bool { s = w.look(t); return s.isOneOf(allowed, volumes) }) {
		t.Fatalf("%s: %+v, want one of %+v with volumes %q\n%s", when, s, allowed, volumes, w.daemon.log)
	}
	return s
}

func (w *deathWorld) running(t *testing.T) bool {
	t.Helper()
	c, err := w.engine.ContainerInspect(context.Background(), w.id)
	if err != nil {
		t.Fatal(err)
	}
	return c.State.Running
}

// deathPoll reports whether condition came true within limit.
func deathPoll(limit time.Duration, condition func() bool) bool {
	deadline := time.Now().Add(limit)
	for !condition() {
		if time.Now().After(deadline) {
			return false
		}
		<-time.After(50 * time.Millisecond)
	}
	return true
}

// deathDaemon is one process of the daemon.
type deathDaemon struct {
	cmd     *exec.Cmd
	url     string
	log     *deathLog
	exited  chan struct{}
	waitErr error // after exited
}

// start starts a daemon on the world's bind root and waits until it listens.
func (w *deathWorld) start(t *testing.T) {
	t.Helper()
	w.spawn(t)
	select {
	case w.daemon.url = <-w.daemon.log.url:
	case <-w.daemon.exited:
		t.Fatalf("the daemon does not start: %v\n%s", w.daemon.waitErr, w.daemon.log)
	case <-time.After(30 * time.Second):
		t.Fatalf("the daemon does not listen\n%s", w.daemon.log)
	}
}

func (w *deathWorld) spawn(t *testing.T) {
	t.Helper()
	if w.daemon != nil && w.daemon.log.contains("DATA RACE") {
		t.Errorf("the daemon has a data race:\n%s", w.daemon.log)
	}
	binary, err := deathBinary()
	if err != nil {
		t.Fatal(err)
	}
	d := &deathDaemon{log: &deathLog{url: make(chan string, 1)}, exited: make(chan struct{})}
	d.cmd = exec.Command("/proc/self/fd/3", // which is the binary, for the process itself
		"-addr", "127.0.0.1:0", "-binds", w.binds, "-corekey", w.keyFile, "-fetch-allow", "127.0.0.0/8", "-stop-timeout", "5s")
	d.cmd.ExtraFiles = []*os.File{binary}
	d.cmd.Dir = w.dir
	d.cmd.Env = []string{"DOCKER_HOST=unix://" + w.proxy.socket}
	d.cmd.Stderr = d.log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // never outlives the test
	// Pdeathsig is sent when this thread ends, which another goroutine that locks it could cause.
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	if w.alone {
		root := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
		d.cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		d.cmd.SysProcAttr.UidMappings, d.cmd.SysProcAttr.GidMappings = root, root
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the process
		d.waitErr = d.cmd.Wait()
		close(d.exited)
	}()
	w.daemon = d
}

// kill returns when the process is no more.
func (d *deathDaemon) kill() {
	d.cmd.Process.Kill()
	<-d.exited
}

// wait reports whether the process ended within limit.
func (d *deathDaemon) wait(limit time.Duration) bool {
	select {
	case <-d.exited:
		return true
	case <-time.After(limit):
		return false
	}
}

// deathLog is what a daemon writes to stderr.
type deathLog struct {
	mu   sync.Mutex
	text bytes.Buffer
	url  chan string // takes the daemon's address, once
}

var deathListening = regexp.MustCompile(`msg=listening addr=(\S+)`)

func (l *deathLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(p)
	if found := deathListening.FindSubmatch(p); found != nil {
		l.url <- "http://" + string(found[1])
	}
	return len(p), nil
}

func (l *deathLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *deathLog) contains(text string) bool { return strings.Contains(l.String(), text) }

// deathBinary builds the daemon once. The file is open and has no name any more, so that
// nothing has to remove it.
var deathBinary = sync.OnceValues(func() (*os.File, error) { return buildDeath("-race", ".") })

// deathService builds a static program that waits for SIGTERM.
var deathService = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "duxcore-death-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	source := filepath.Join(dir, "service.go")
	const text = `package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM)
	<-c
}

`
	if err := os.WriteFile(source, []byte(text), 0o600); err != nil {
		return nil, err
	}
	program, err := buildDeath("-ldflags=-s -w", source)
	if err != nil {
		return nil, err
	}
	defer program.Close()
	return io.ReadAll(program)
})

// buildDeath builds a program: with cgo if that is for the race detector, else static.
func buildDeath(option, source string) (*os.File, error) {
	dir, err := os.MkdirTemp("", "duxcore-death-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	target := filepath.Join(dir, "program")
	cmd := exec.Command("go", "build", option, "-buildvcs=false", "-o", target, source)
	cmd.Env = os.Environ()
	if option != "-race" {
		cmd.Env = append(cmd.Env, "CGO_ENABLED=0")
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("cannot build %s: %w\n%s", source, err, out)
	}
	return os.Open(target)
}

// leaveAt has the client of the next request leave at one of the engine calls that the
// daemon makes for it. The call goes on when the daemon has given it up, or, if it does
// not do that, at once.
func (w *deathWorld) leaveAt(call int, leave func(), givenUp bool) {
	var calls atomic.Int64
	w.proxy.setHook(func(r *http.Request) (*http.Response, error) {
		if calls.Add(1)-1 == int64(call) {
			leave()
			if givenUp {
				<-r.Context().Done()
			}
		}
		return w.proxy.transport.RoundTrip(r)
	})
}

// sendAndLeave sends a request and waits until the daemon is done with it, though nobody
// waits for the answer.
func (w *deathWorld) sendAndLeave(t *testing.T, ctx context.Context, r deathRequest) {
	t.Helper()
	w.send(ctx, r)
	logged := regexp.MustCompile(fmt.Sprintf(`remote=%s\s`, w.lastFrom.Load()))
	if !deathPoll(20*time.Second, func() bool { return logged.MatchString(w.daemon.log.String()) }) {
		t.Fatalf("the daemon goes on with a request whose client has left\n%s", w.daemon.log)
	}
	w.proxy.setHook(nil)
	w.onDownload.Store(nil)
	if ctx.Err() == nil {
		t.Fatal("the client did not leave")
	}
}

func TestCreateIsUndoneWhenItsClientLeaves(t *testing.T) {
	t.Parallel()
	w := newDeathWorld(t)
	create := deathOps[0]
	calls, _ := w.rehearse(t, create)
	for i, call := range append(calls, deathCall{name: "download"}) {
		t.Run(call.name, func(t *testing.T) {
			w.begin(t, create)
			ctx, leave := context.WithCancel(t.Context())
			// Where the call does not end with the client, the download after it does.
			w.leaveAt(i, leave, strings.HasPrefix(call.name, "GET /images/"))
			download := func(r *http.Request) { leave(); <-r.Context().Done() }
			want := []deathState{{}}
			if strings.HasSuffix(call.name, "/rename") {
				want = append(want, create.new) // the daemon may learn of it too late
			} else {
				w.onDownload.Store(&download)
			}
			w.sendAndLeave(t, ctx, create.request)
			got := w.look(t)
			if !got.isOneOf(want, "") {
				t.Errorf("left %+v, want %+v\n%s", got, want, w.daemon.log)
			}
			if got == (deathState{}) {
				w.mustSend(t, create.request, http.StatusCreated)
			}
			w.mustSend(t, deathDelete, http.StatusNoContent)
		})
	}
}

func TestOtherChangesFinishWhenTheirClientLeaves(t *testing.T) {
	t.Parallel()
	w := newDeathWorld(t)
	for _, name := range []string{"PUT", "restart", "start", "DELETE"} { // a PATCH makes no engine call
		op := deathOpNamed(name)
		t.Run(op.name, func(t *testing.T) {
			w.begin(t, op)
			volumes := w.look(t).volumes
			ctx, leave := context.WithCancel(t.Context())
			w.leaveAt(0, leave, false)
			w.sendAndLeave(t, ctx, op.request)
			if got := w.look(t); !got.isOneOf([]deathState{op.new}, volumes) {
				t.Errorf("left %+v, want %+v\n%s", got, op.new, w.daemon.log)
			}
			if op.new != (deathState{}) {
				w.mustSend(t, deathDelete, http.StatusNoContent)
			}
		})
	}
}

// stopUnderWay sends a stop, and SIGTERM when the engine call for it is under way. The
// engine sees that call when release is closed. It returns when the daemon accepts no
// connection any more.
func (w *deathWorld) stopUnderWay(t *testing.T, release <-chan struct{}) (answered chan deathAnswer) {
	t.Helper()
	w.begin(t, &deathOp{prepare: []deathRequest{deathCreate, deathStart}})
	stopping := make(chan struct{})
	w.proxy.setHook(func(r *http.Request) (*http.Response, error) {
		if strings.HasSuffix(r.URL.Path, "/stop") {
			close(stopping)
			select {
			case <-release:
			case <-r.Context().Done():
				return nil, r.Context().Err()
			}
		}
		return w.proxy.transport.RoundTrip(r)
	})
	answered = make(chan deathAnswer, 1)
	go func() {
		answered <- w.send(context.Background(), deathStop)
	}()
	<-stopping
	w.daemon.cmd.Process.Signal(syscall.SIGTERM)
	if !deathPoll(10*time.Second, func() bool {
		conn, err := net.Dial("tcp", strings.TrimPrefix(w.daemon.url, "http://"))
		if err == nil {
			conn.Close()
		}
		return err != nil
	}) {
		t.Fatalf("the daemon accepts connections after SIGTERM\n%s", w.daemon.log)
	}
	return answered
}

func TestStopUnderWayFinishesAfterSIGTERM(t *testing.T) {
	t.Parallel()
	w := newDeathWorld(t)
	release := make(chan struct{})
	answered := w.stopUnderWay(t, release)
	close(release)
	if answer := <-answered; answer.status != http.StatusNoContent {
		t.Errorf("stop: %+v, want 204", answer)
	}
	if !w.daemon.wait(10 * time.Second) {
		t.Fatalf("the daemon did not end\n%s", w.daemon.log)
	}
	if code := w.daemon.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit status %d, want 0\n%s", code, w.daemon.log)
	}
	if w.running(t) {
		t.Error("the service still runs")
	}
}

func TestSecondSIGTERMExitsAtOnce(t *testing.T) {
	t.Parallel()
	w := newDeathWorld(t)
	answered := w.stopUnderWay(t, nil)
	// The daemon gives the signal back its default action shortly after the first one.
	if !deathPoll(5*time.Second, func() bool {
		w.daemon.cmd.Process.Signal(syscall.SIGTERM)
		return w.daemon.wait(0)
	}) {
		t.Fatalf("the daemon did not end\n%s", w.daemon.log)
	}
	if answer := <-answered; answer.err == nil {
		t.Errorf("stop: %+v, want a broken connection", answer)
	}
	w.proxy.setHook(nil)
	w.start(t)
	w.mustSend(t, deathDelete, http.StatusNoContent)
	if got := w.look(t); got != (deathState{}) {
		t.Errorf("left %+v, want nothing", got)
	}
}

func TestDaemonsOnOneEngineLeaveEachOthersHalfMadeServicesAlone(t *testing.T) {
	t.Parallel()
	w, other := newDeathWorld(t), newDeathWorld(t)
	for _, half := range []struct{ op, lastCall string }{
		{"create", "POST /containers/create"},
		{"start", "POST /containers/create"},
		{"restart", "DELETE /containers/*"},
		{"DELETE", "DELETE /containers/*"},
	} {
		t.Run(half.op, func(t *testing.T) {
			op := deathOpNamed(half.op)
			calls, _ := w.rehearse(t, op)
			last := slices.IndexFunc(calls, func(c deathCall) bool { return c.name == half.lastCall })
			w.begin(t, op)
			volumes := w.look(t).volumes
			w.proxy.dieAt(w.daemon, plannedDeath{call: last, side: dieAfter})
			w.send(t.Context(), op.request)
			if !w.daemon.wait(20 * time.Second) {
				t.Fatal("the daemon did not die")
			}
			w.proxy.setHook(nil)
			halfMade := w.look(t)
			if halfMade.isOneOf([]deathState{op.old, op.new}, volumes) {
				t.Fatalf("nothing is half made: %+v", halfMade)
			}
			other.daemon.kill()
			other.start(t)
			if got := w.look(t); got != halfMade {
				t.Errorf("another daemon made %+v of %+v\n%s", got, halfMade, other.daemon.log)
			}
			w.start(t)
			w.wantState(t, "after its own daemon started", volumes, op.old, op.new)
			w.send(t.Context(), deathDelete)
			w.wantState(t, "after it was deleted", "", deathState{})
		})
	}
}

func TestFullDiskDuringCreateUndoesIt(t *testing.T) {
	t.Parallel()
	w := newDeathWorld(t)
	w.daemon.kill()
	if err := syscall.Mount("tmpfs", w.binds, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatalf("this test mounts a small file system, which takes root and CAP_SYS_ADMIN: %v", err)
	}
	t.Cleanup(func() {
		w.daemon.kill()
		if err := syscall.Unmount(w.binds, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	w.start(t)
	w.begin(t, deathOps[0])
	w.mustSend(t, deathCreate, http.StatusInsufficientStorage)
	if got := w.look(t); got != (deathState{}) {
		t.Errorf("left %+v, want nothing", got)
	}
	empty := deathRequest{"POST", "/service", `{"type":"raw","params":{"id":"ID","image":"IMAGE","bind_dir":"/data"}}`}
	w.mustSend(t, empty, http.StatusCreated)
	if err := os.WriteFile(w.binds+"/"+w.id+"/file", make([]byte, 200<<10), 0o600); err != nil {
		t.Errorf("the disk is still full: %v", err)
	}
	w.mustSend(t, deathDelete, http.StatusNoContent)
}

// A customer fills the first level of its directory, so that it has no room for one name more, and
// then the disk; and so may the root have no room for one.
func TestFullDiskCanBeEmptied(t *testing.T) {
	t.Parallel()
	d := newDisk(t, "with a journal")
	m := newMachine(t, func(c *config) { c.binds = filepath.Join(d.dir, "binds") })
	id := m.create(t, "")
	dir := filepath.Join(m.binds, id)
	for i := range 100 {
		if err := os.MkdirAll(fmt.Sprintf("%s/%0200d/is/not/empty", dir, i), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	full := func(what string, more func(i int) error) {
		for i := range 1 << 20 {
			if err := more(i); errors.Is(err, syscall.ENOSPC) {
				return
			} else if err != nil {
				t.Fatal(err)
			}
		}
		t.Fatalf("%s is never full", what)
	}
	file, err := os.Create(dir + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	full("the disk", func(int) error { _, err := file.Write(make([]byte, 1<<10)); return err })
	// A short link stands in the directory alone.
	full("the root", func(i int) error { return os.Symlink("x", fmt.Sprintf("%s/%d", m.binds, i)) })
	full("the directory", func(i int) error { return os.Symlink("x", fmt.Sprintf("%s/%d", dir, i)) })

	m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
	for _, name := range bindDirs(t, m.binds) {
		if strings.Contains(name, id) {
			t.Errorf("there is %s", name)
		}
	}
	m.do(t, "DELETE", "/service/"+m.create(t, ""), "").want(t, http.StatusNoContent)
}

func TestCreateThatCannotGiveItsDirectoryAwayLeavesNothing(t *testing.T) {
	t.Parallel()
	w := newDeathWorld(t)
	w.daemon.kill()
	w.alone = true
	w.start(t)
	w.begin(t, deathOps[0])
	create := deathRequest{"POST", "/service", `{"type":"raw","params":{"id":"ID","image":"IMAGE","bind_dir":"/data","user":"1000"}}`}
	w.mustSend(t, create, http.StatusInternalServerError)
	waitFor(t, "its reason in the log", func() bool { return w.daemon.log.contains("invalid argument") })
	if got := w.look(t); got != (deathState{}) {
		t.Errorf("left %+v, want nothing", got)
	}
}

func TestRestartThatFailsLeavesTheServiceRunning(t *testing.T) {
	t.Parallel()
	w := newDeathWorld(t)
	w.begin(t, deathOpNamed("restart"))
	before := w.look(t)
	w.proxy.setHook(func(r *http.Request) (*http.Response, error) {
		if !strings.HasSuffix(r.URL.Path, "/containers/create") {
			return w.proxy.transport.RoundTrip(r)
		}
		return &http.Response{StatusCode: http.StatusInternalServerError, Header: http.Header{"Content-Type": {"application/json"}},
			Body: io.NopCloser(strings.NewReader(`{"message":"no space left"}`))}, nil
	})
	w.mustSend(t, deathRestart, http.StatusBadGateway)
	w.proxy.setHook(nil)
	if got := w.look(t); got != before || !w.running(t) {
		t.Errorf("after the restart that failed: %+v, it runs: %v; want %+v", got, w.running(t), before)
	}
	w.mustSend(t, deathRestart, http.StatusNoContent)
	if got := w.look(t); !got.isOneOf([]deathState{deathOpNamed("restart").new}, before.volumes) {
		t.Errorf("after the next restart: %+v", got)
	}
	w.mustSend(t, deathDelete, http.StatusNoContent)
}

// After a reboot an administrator starts everything: docker start $(docker ps -aq).
func TestContainersThatAllWereStartedByHandAfterADeath(t *testing.T) {
	t.Parallel()
	w := newDeathWorld(t)
	op := deathOpNamed("restart")
	calls, _ := w.rehearse(t, op)
	for i, call := range calls {
		t.Run(fmt.Sprintf("%d %s", i, call.name), func(t *testing.T) {
			w.begin(t, op)
			w.proxy.dieAt(w.daemon, plannedDeath{call: i, side: dieAfter})
			w.send(t.Context(), op.request)
			if !w.daemon.wait(20 * time.Second) {
				t.Fatal("the daemon did not die")
			}
			w.proxy.setHook(nil)
			for _, c := range w.containers(t) {
				if err := w.engine.ContainerStart(t.Context(), c.ID, container.StartOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			w.start(t)
			w.mustSend(t, deathStart, http.StatusNoContent)
			if all := w.containers(t); len(all) != 1 || all[0].State != "running" {
				t.Errorf("after a start there are %+v", all)
			}
			w.mustSend(t, deathStop, http.StatusNoContent)
			if w.running(t) {
				t.Error("it runs after a stop")
			}
			w.mustSend(t, deathDelete, http.StatusNoContent)
			w.wantState(t, "after it was deleted", "", deathState{})
		})
	}
}
