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
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/docker/docker/api/types"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/client"
)

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
	died                  bool   // in a download: what asks the engine next does so no more
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
	w.daemon = newServer(context.Background(), context.Background(), cfg, coreKey{}, e, binds, slog.New(slog.DiscardHandler))
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

// Read is where the download has come half-way. It is called on a goroutine that the request waits for.
func (c exploreContents) Read([]byte) (int, error) {
	if c.w.deaths > 0 && c.w.choose(2) == 1 {
		c.w.deaths--
		c.w.note("   dies in the middle of it")
		c.w.died = true
		return 0, errors.New("dead")
	}
	return 0, io.EOF
}

// RoundTrip is a call of the daemon's to the engine. It does not return if the daemon dies.
func (w *exploration) RoundTrip(r *http.Request) (*http.Response, error) {
	if w.died {
		w.died = false
		runtime.Goexit()
	}
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
