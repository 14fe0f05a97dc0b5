package main

import (
	"bytes"
	"context"
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
	"github.com/docker/docker/client"
)

var exploreSizes = flag.String("explore", "3 1 1 0, 3 1 0 1, 3 1 0 0 nature",
	"sizes of the histories: requests, deaths, late calls and engine errors, and whether there are power cuts "+
		"and prunes")

// TestEveryHistoryKeepsItsPromises takes the real code through every history of a few requests to one
// service, of which the first creates it. In a history the daemon dies, before or after a call to the engine,
// before the sync of a change to the bind root, or with its call still on its way, which the engine carries
// out at any later moment. The engine fails, with or without having done what it was asked for. With "nature"
// the power is cut, after which the engine knows what it knew at any earlier request, and an administrator
// prunes the containers. What was answered has to be true in the end, and nothing may be left half done. The
// first history of each sequence of requests that breaks a promise is printed.
//
// A death ends the request's goroutine, which runs its deferred calls. A daemon that is killed does not run
// them, so nothing that settling depends on may be deferred.
func TestEveryHistoryKeepsItsPromises(t *testing.T) {
	t.Parallel()
	sizes := *exploreSizes
	switch asked := sizes != flag.Lookup("explore").DefValue; {
	case asked:
	case raceDetector():
		sizes = "2 1 1 0, 2 1 0 1, 2 1 0 0 nature"
	case testing.Short():
		sizes = "2 1 1 1, 3 1 0 0 nature"
	}
	for size := range strings.SplitSeq(sizes, ",") {
		var requests, deaths, lates, errors int
		if _, err := fmt.Sscan(size, &requests, &deaths, &lates, &errors); err != nil {
			t.Fatal(err)
		}
		ops := []string{"create", "patch", "restart", "delete"}
		if strings.HasSuffix(size, " nature") {
			ops = append(ops, "power", "prune")
		}
		exploreAll(t, size, ops, requests, exploration{deaths: deaths, lates: lates, errors: errors})
	}
}

func exploreAll(t *testing.T, size string, ops []string, requests int, budget exploration) {
	sequences := [][]string{{"create"}}
	for range requests - 1 {
		var longer [][]string
		for _, sequence := range sequences {
			for _, op := range ops {
				longer = append(longer, append(slices.Clone(sequence), op))
			}
		}
		sequences = longer
	}
	var histories atomic.Int64
	t.Run(strings.TrimSpace(size), func(t *testing.T) {
		for _, sequence := range sequences {
			t.Run(strings.Join(sequence, " "), func(t *testing.T) {
				t.Parallel()
				for c := new(choices); ; {
					w := newExploration(t, c, budget)
					w.run(sequence)
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
	t.Logf("%d histories of %s", histories.Load(), size)
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

// exploration is one history: an engine, a bind root, and one daemon after another.
type exploration struct {
	*choices
	t                     *testing.T
	deaths, lates, errors int // how many may still come
	engine                *fakeEngine
	image, dir            string
	daemon                *services
	late                  []*http.Request // calls of a dead daemon that are on their way
	past                  []moment        // what the engine knew when each request began
	used                  string          // what the service has written to its directory
	volume                string          // of the service
	nature                bool            // the power was cut, or containers were pruned
	trace                 []string
	broken                string // the first promise that was broken
}

// serviceState is what a client may find: the environments of the service and of its next start.
type serviceState struct{ current, next string }

func newExploration(t *testing.T, c *choices, budget exploration) *exploration {
	t.Helper()
	w := &budget
	w.choices, w.t, w.engine, w.dir = c, t, bareFakeEngine(t), tempInMemory(t)
	w.image = w.engine.newImage("img:1", []string{"/run"}).id
	w.start()
	return w
}

// start starts a daemon, in place of a dead one.
func (w *exploration) start() {
	if w.daemon != nil {
		w.daemon.binds.close()
	}
	var binds *bindRoot
	var err error
	// A program that another test starts has the dead daemon's descriptor, and its lock, until it has been
	// executed.
	waitFor(w.t, "the bind root is free", func() bool {
		binds, err = openBinds(w.dir)
		return err == nil || !strings.Contains(err.Error(), "in use by another daemon")
	})
	must(w.t, err)
	must(w.t, binds.adopt())
	binds.beforeSync = w.mayDie
	sdk, err := client.NewClientWithOpts(client.WithHost("tcp://engine:1"))
	if err == nil {
		err = client.WithHTTPClient(&http.Client{Transport: w})(sdk)
	}
	must(w.t, err)
	sdk.NegotiateAPIVersionPing(types.Ping{APIVersion: w.engine.dialect.newest})
	e := &engine{}
	e.sdk.Store(sdk)
	cfg, err := parseConfig(nil, nil, io.Discard)
	must(w.t, err)
	server := newServer(context.Background(), context.Background(), cfg, keyDigest{}, e, binds,
		slog.New(slog.DiscardHandler))
	w.daemon = server.services
	w.daemon.fetcher.client.Transport = exploreContents{w}
}

// mayDie is where the daemon has changed a file, and not synced it yet.
func (w *exploration) mayDie() {
	if w.deaths > 0 && w.choose(2) == 1 {
		w.deaths--
		w.note("   dies before a sync")
		runtime.Goexit()
	}
}

// exploreContents is where bind_contents come from. The daemon can die in the middle of them.
type exploreContents struct{ w *exploration }

var exploreArchive = tgz(file("first", "1"), file("second", "2"))

func (c exploreContents) RoundTrip(*http.Request) (*http.Response, error) {
	w := c.w
	body := io.MultiReader(bytes.NewReader(exploreArchive[:len(exploreArchive)/2]), c,
		bytes.NewReader(exploreArchive[len(exploreArchive)/2:]))
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

// hold keeps a call for later.
func (w *exploration) hold(r *http.Request) {
	late := r.Clone(context.Background())
	if r.Body != nil {
		text, _ := io.ReadAll(r.Body)
		late.Body = io.NopCloser(bytes.NewReader(text))
	}
	w.late = append(w.late, late)
}

func (w *exploration) carryOutLate() {
	w.note("   late: %s", exploreName(w.late[0]))
	w.carryOut(w.late[0])
	w.late = w.late[1:]
}

// do makes one request. It reports whether the daemon lived to answer it.
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

// run makes the requests in turn. may is the set of the states that the answers so far allow.
func (w *exploration) run(ops []string) {
	defer os.RemoveAll(w.dir)
	defer func() { w.daemon.binds.close() }()
	may := map[serviceState]bool{{}: true}
	for i, op := range ops {
		env := fmt.Sprintf("E=%d", i)
		w.note("%s %s", op, env)
		w.past = append(w.past, w.engine.now())
		switch op {
		case "power":
			w.cutPower()
		case "prune":
			w.nature = true
			w.engine.prune()
		default:
			may = w.request(op, env, may)
		}
		if w.broken != "" {
			return
		}
		if w.nature {
			exploreRepaired(may)
		}
		w.use()
	}
	w.deaths, w.lates, w.errors = 0, 0, 0
	w.note("in the end")
	for range 3 {
		for len(w.late) > 0 {
			w.carryOutLate()
		}
		w.settle()
	}
	if w.nature {
		exploreRepaired(may)
	}
	w.judge(may)
}

// settle does what a round does. It reports whether the daemon lived to the end of it.
func (w *exploration) settle() bool {
	alive, _ := w.do(func() error { _, err := w.daemon.settle(context.Background(), "web"); return err })
	return alive
}

// restart starts daemons until one lives.
func (w *exploration) restart() {
	for w.start(); !w.settle(); w.start() {
	}
}

// cutPower takes the engine back to an earlier moment. The files are as they were: they were synced.
func (w *exploration) cutPower() {
	at := w.choose(len(w.past))
	w.note("   the engine is as before request %d", at)
	w.nature, w.late = true, nil
	w.engine.cutPower(w.past[at])
	w.restart()
}

// request makes a request, and returns the states that its answer allows.
func (w *exploration) request(op, env string, may map[serviceState]bool) map[serviceState]bool {
	quiet := len(w.late) == 0
	answered, err := w.do(func() error { return w.send(op, env) })
	if !answered {
		w.restart()
		maps.Copy(may, exploreDone(may, op, env))
		return may
	}
	if err == nil {
		may = exploreAfter(may, op, env)
		w.promise(len(may) > 0, "%s is answered with success, which cannot be", op)
		runs := slices.ContainsFunc(w.engine.containers, func(c *fakeContainer) bool { return c.Running })
		w.promise(op != "restart" || runs, "a restart has succeeded, and the service does not run")
		return may
	}
	kind, _ := describe(err)
	w.note("   answered %d %v", kind.status, err)
	refused := exploreRefused(may, op, env)
	if (kind == kindNoSuchService || kind == kindDirectoryInUse || kind == kindIDTaken && quiet) &&
		len(refused) > 0 {
		return refused
	}
	w.promise(!quiet || kind == kindEngineFailed, "%s is answered with %d %v", op, kind.status, err)
	maps.Copy(may, exploreDone(may, op, env))
	return may
}

// send makes one request, as its handler would.
func (w *exploration) send(op, env string) error {
	ctx := context.Background()
	switch op {
	case "create":
		return w.daemon.create(ctx, serviceParams{ID: "web", Image: "img:1", BindDir: "/data", Env: []string{env},
			BindContents: "http://contents/"}, "")
	case "patch":
		return w.daemon.setEnv(ctx, "web", []string{env})
	case "restart":
		return w.daemon.change(ctx, "web", w.daemon.restart)
	default:
		return w.daemon.remove(ctx, "web")
	}
}

// use has a service that exists write to its directory, as it would, and look at what it wrote before.
func (w *exploration) use() {
	exists, err := w.daemon.binds.exists("web")
	must(w.t, err)
	if !exists {
		w.used, w.volume = "", ""
		return
	}
	name := filepath.Join(w.dir, "web", "data")
	text, err := os.ReadFile(name)
	w.promise(string(text) == w.used, "the directory has the data %q, not %q: %v", text, w.used, err)
	w.used = fmt.Sprint("written after ", len(w.past))
	err = os.WriteFile(name, []byte(w.used), 0o600)
	w.promise(err == nil, "a service has no directory: %v", err)
	if c := w.engine.byName("web"); c != nil {
		w.promise(w.nature || w.volume == "" || w.volume == c.volume, "the service has lost its volume")
		w.volume = c.volume
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

// exploreRepaired adds what a repair may have done: a container that is missing is made from what is pending.
func exploreRepaired(may map[serviceState]bool) {
	for s := range maps.Clone(may) {
		if s.next != "" {
			may[serviceState{s.next, ""}] = true
		}
	}
}

// judge looks at what is left in the end.
func (w *exploration) judge(may map[serviceState]bool) {
	w.use()
	record, err := w.daemon.binds.record("web")
	must(w.t, err)
	names, files := w.engine.names(), bindDirs(w.t, w.dir)
	if record == nil {
		w.promise(may[serviceState{}], "there is no service, may be %v", slices.Collect(maps.Keys(may)))
		w.promise(len(names)+len(w.engine.volumes)+len(files) == 0, "left: %q, volumes %v, files %q", names,
			w.engine.volumes, files)
		return
	}
	is := serviceState{current: record.Params.Env[0]}
	if record.Pending != nil {
		is.next = record.Pending.Params.Env[0]
	}
	w.promise(may[is], "the service is %+v, may be %v", is, slices.Collect(maps.Keys(may)))
	w.promise(slices.Equal(files, []string{"web"}), "the files are %q", files)
	if w.promise(slices.Equal(names, []string{"web"}), "the containers are %q", names); w.broken != "" {
		return
	}
	c := w.engine.byName("web")
	w.promise(slices.Equal(c.Config.Env, []string{is.current}) && c.imageID == w.image, "the container has %q",
		c.Config.Env)
	w.promise(len(w.engine.volumes) == 1 && w.engine.volumes[c.volume], "the volumes are %v", w.engine.volumes)
	first, _ := os.ReadFile(filepath.Join(w.dir, "web", "first"))
	second, _ := os.ReadFile(filepath.Join(w.dir, "web", "second"))
	w.promise(string(first)+string(second) == "12", "the contents are %q and %q", first, second)
}
