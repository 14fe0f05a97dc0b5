package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Whoever still writes to a tree that is deleted can put a pipe where a directory was.
func TestPipeInThePlaceOfADirectoryIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	must(t, syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600))
	tree := openDirectory(t, dir)
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

// An administrator may have put a link where a bind directory is looked for.
func TestLinkInThePlaceOfABindDirectoryIsNotFollowed(t *testing.T) {
	t.Parallel()
	for _, target := range []string{"web", "../web", "/etc"} {
		e, d := startWithService(t)
		data := filepath.Join(d.binds, "web", "data")
		must(t, errors.Join(os.WriteFile(data, []byte("precious"), 0o600),
			os.Symlink(target, filepath.Join(d.binds, "link"))))
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

// The bind root is moved to another disk and a link is left, or a disk is mounted over it, while the daemon
// runs. The engine resolves the path at each start, so it would mount a directory that the daemon cannot
// delete.
func TestMovedBindRootIsNotWorkedWith(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	before := state(t, e, d)
	moved := d.binds + "-moved"
	must(t, os.Rename(d.binds, moved))
	d.do(t, "GET", "/health", "").want(t, 503, "bind_root_moved") // with nothing in its place
	must(t, os.Mkdir(d.binds, 0o700))
	asked := len(e.calls())
	for _, request := range []struct{ method, path, body string }{
		{"DELETE", "/service/web", ""}, {"POST", "/service", createBodyJSON("new", "")},
		{"POST", "/service", createBodyJSON("web", "")}, {"PUT", "/service/web", createBodyJSON("web", "")},
		{"PATCH", "/service/web/env", "{}"}, {"GET", "/health", ""}, {"POST", "/service/web/ctl", `{"op":"start"}`},
		{"POST", "/service/web/ctl", `{"op":"stop"}`}, {"POST", "/service/web/ctl", `{"op":"restart"}`},
		{"POST", "/service/web/ctl", `{"op":"kill"}`},
	} {
		d.do(t, request.method, request.path, request.body).want(t, 503, "bind_root_moved")
	}
	for _, call := range e.calls()[asked:] {
		if !strings.HasPrefix(call, "GET ") {
			t.Errorf("the engine was asked %s", call)
		}
	}
	// Renamed on its own disk, with a link in its place, it is still the same directory.
	must(t, errors.Join(os.Remove(d.binds), os.Symlink(moved, d.binds)))
	wantState(t, e, d, before)
	d.do(t, "GET", "/health", "").want(t, 204)
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	wantNothing(t, d, e)
}

// A daemon that was started before the disk of its bind root was mounted sees an empty root.
func TestRootWithoutRecordsCostsNothing(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	pending := imageID.FindString(strings.Split(d.do(t, "POST", "/docker/image", wholeTar()).want(t, 201).body,
		`"`)[3])
	d.do(t, "PUT", "/service/web", createBodyJSON("web",
		fmt.Sprintf(`"cmd":["/x"],"image":%q`, pending))).want(t, 204)
	must(t, d.stop())
	disk := d.binds + "-disk"
	must(t, os.Rename(d.binds, disk))
	d = startDaemon(t, e.host(), func(c *config) { c.binds = d.binds })
	d.do(t, "GET", "/health", "").want(t, 503, "unavailable")
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 503)
	// Nothing may be called gone, or a core creates it elsewhere.
	for _, path := range []string{"/service", "/service/web", "/service/web/params", "/service/web/logs",
		"/service/web/stats"} {
		d.do(t, "GET", path, "").want(t, 503)
	}
	d.do(t, "PUT", "/service/web", createBodyJSON("web", "")).want(t, 503)
	d.do(t, "DELETE", "/docker/image/"+pending, "").want(t, 503)
	if !strings.Contains(d.log.String(), "is its disk mounted?") || !slices.Equal(e.names(), []string{"web"}) {
		t.Errorf("there are %q; the log: %s", e.names(), d.log)
	}
	must(t, errors.Join(d.stop(), os.RemoveAll(d.binds), os.Rename(disk, d.binds)))
	d = startDaemon(t, e.host(), func(c *config) { c.binds = d.binds })
	d.do(t, "GET", "/health", "").want(t, 204)
	// A backup without its dot directories: the containers and their directories are left alone.
	must(t, errors.Join(d.stop(), os.RemoveAll(filepath.Join(d.binds, recordDir)),
		os.Mkdir(filepath.Join(d.binds, recordDir), 0o700)))
	d = startDaemon(t, e.host(), func(c *config) { c.binds = d.binds })
	if !strings.Contains(d.log.String(), "restore the record") || !slices.Equal(e.names(), []string{"web"}) {
		t.Errorf("there are %q; the log: %s", e.names(), d.log)
	}
	d.do(t, "GET", "/service/web", "").want(t, 404)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 409)
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	wantNothing(t, d, e)
}

// A round can take long: the root may move in the middle of it.
func TestRootThatMovesDuringARoundIsNotWorkedWith(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addImage("img:1")
	s := bareServer(t, e, nil).services
	for _, id := range []string{"aa", "bb"} {
		err := s.create(t.Context(), serviceParams{ID: id, Image: "img:1", BindDir: "/data"}, "")
		must(t, errors.Join(err, s.binds.mark(id)))
	}
	moved := s.binds.path + "-moved"
	t.Cleanup(func() { os.RemoveAll(moved) })
	var once sync.Once
	e.setIntercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodDelete {
			once.Do(func() {
				if err := errors.Join(os.Rename(s.binds.path, moved),
					os.MkdirAll(s.binds.path+"/bb", 0o700)); err != nil {
					t.Error(err)
				}
			})
		}
		return false
	})
	if err := s.settleAll(t.Context()); err != nil {
		t.Error(err)
	}
	e.wantNames(t, "bb")
}

// If a directory cannot be opened for its sync, nothing is changed: a create that fails must not leave a
// service.
func TestChangeThatCannotBeSyncedIsNotMade(t *testing.T) {
	t.Parallel()
	_, server := bareService(t)
	b := server.services.binds
	for name, change := range map[string]struct {
		dir string
		do  func() error
	}{
		"mark":   {markDir, func() error { return b.mark("web") }},
		"record": {recordDir, func() error { return b.removeRecord("web") }},
	} {
		must(t, b.root.Rename(change.dir, "away"))
		err := change.do()
		if renameErr := b.root.Rename("away", change.dir); renameErr != nil {
			t.Fatal(renameErr)
		}
		if exists, existsErr := b.exists("web"); err == nil || existsErr != nil || !exists {
			t.Errorf("%s: %v; the service exists: %v, %v", name, err, exists, existsErr)
		}
	}
}

func TestServicesOfOtherBindRootsAreOneWarning(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	for _, name := range []string{"one", "two", candidatePrefix + "two"} { // the last is half made
		id := strings.TrimPrefix(name, candidatePrefix)
		e.addForeign(name, map[string]string{labelService: id, labelBinds: "/elsewhere"}, "/elsewhere/"+id)
	}
	e.addForeign(candidatePrefix+"half", map[string]string{labelService: "half", labelBinds: d.binds},
		filepath.Join(d.binds, "half"))
	must(t, d.stop())
	d = startDaemon(t, e.host(), func(c *config) { c.binds = d.binds })
	e.wantNames(t, candidatePrefix+"two", "one", "two", "web")
	if log := d.log.String(); !strings.Contains(log, "map[/elsewhere:3]") {
		t.Errorf("the log: %s", log)
	}
	d.do(t, "GET", "/service", "").want(t, 200, `"/web"`)
	d.do(t, "DELETE", "/service/one", "").want(t, 404)
}

func TestBindDirectoryWithDataIsNeitherUsedNorErased(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	data := filepath.Join(d.binds, "new", "data")
	must(t, errors.Join(os.Mkdir(filepath.Dir(data), 0o700), os.WriteFile(data, []byte("precious"), 0o600)))
	d.do(t, "POST", "/service", createBodyJSON("new", "")).want(t, 409, "not empty")
	if text, err := os.ReadFile(data); err != nil || string(text) != "precious" || len(e.names()) != 1 {
		t.Errorf("the data: %q, %v; the containers: %q", text, err, e.names())
	}
	must(t, os.Remove(data)) // an empty directory is no obstacle
	d.do(t, "POST", "/service", createBodyJSON("new", "")).want(t, 201)
}

func TestStartRemovesDraftsOfRecords(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	draft := filepath.Join(dir, recordDir, "web"+draftSuffix)
	must(t, errors.Join(os.Mkdir(filepath.Dir(draft), 0o700), os.WriteFile(draft, []byte("{"), 0o600)))
	b, err := openBinds(dir)
	must(t, err)
	defer b.close()
	if _, err := os.Lstat(draft); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the draft: %v", err)
	}
}

func TestFullDiskDuringACreateUndoesIt(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("mounts a file system, which takes root")
	}
	e := newFakeEngine(t)
	e.addImage("img:1")
	url := serveArchives(t, map[string][]byte{"/large": tgz(file("small", "x"),
		file("large", strings.Repeat("x", 1<<20)))})
	d := startDaemon(t, e.host(), func(c *config) {
		c.fetchAllow = loopback
		mountTmpfs(t, c.binds, "size=512k")
	})
	d.do(t, "POST", "/service", createBodyJSON("web", fmt.Sprintf(`"bind_contents":"%s/large"`, url))).want(t,
		507, "disk_full")
	wantNothing(t, d, e)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	// there is room again
	must(t, os.WriteFile(filepath.Join(d.binds, "web", "file"), make([]byte, 400<<10), 0o600))
}

// A file system that cannot say whether an entry is there must not be taken for one without it.
func TestErrorOfTheFileSystemIsNotAnAbsence(t *testing.T) {
	t.Parallel()
	e, server := bareService(t)
	s := server.services
	e.addForeign(candidatePrefix+"web", map[string]string{labelService: "web", labelBinds: s.binds.path},
		filepath.Join(s.binds.path, "web"))
	before := e.names()
	s.binds.root.Close() // now every look fails, with an error that is not ENOENT
	for name, do := range map[string]func() error{
		"settle": func() error { _, err := s.settle(t.Context(), "web"); return err },
		"DELETE": func() error { return s.remove(t.Context(), "web") },
		"PATCH":  func() error { return s.setEnv(t.Context(), "web", nil) },
		"start":  func() error { return s.change(t.Context(), "web", s.start) },
		"create": func() error {
			return s.create(t.Context(), serviceParams{ID: "new", Image: "img:1", BindDir: "/data"}, "")
		},
		"read": func() error { _, err := s.containers.lookup(t.Context(), "web"); return err },
		"unrecorded": func() error {
			return s.removeUnrecorded(t.Context(), "web", serviceContainers{current: &listEntry{}})
		},
		"unused": func() error { return s.binds.checkUnused("web") },
		"erase":  func() error { return s.binds.erase(t.Context(), "web") },
		"record": func() error { return s.binds.removeRecord("web") },
		"params": func() error { _, err := s.binds.record("web"); return err },
		"unmark": func() error { return s.binds.unmark("web") },
		"list":   func() error { _, err := s.binds.existing(); return err },
		"adopt":  func() error { return s.binds.adopt() },
	} {
		err := do()
		if kind, _ := describe(cmp.Or(err, errors.New("none"))); err == nil || kind.status < 500 {
			t.Errorf("%s: %v %v", name, kind, err)
		}
		if after := e.names(); !slices.Equal(after, before) {
			t.Fatalf("%s made %q of %q", name, after, before)
		}
	}
	tree := openTree(t, t.TempDir())
	u := &unpacker{root: tree, parent: tree, parentDir: "."}
	tree.Close()
	if err := u.placeLink("a", "b"); err == nil || errors.Is(err, errLinkTarget) {
		t.Errorf("an archive's link to a file that cannot be looked at: %v", err)
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
	c.most = max(c.most, len(openFiles(c.dir)))
	return nil
}

// movingContext moves something when it is asked whether to go on.
type movingContext struct {
	context.Context
	move func()
}

func (c movingContext) Err() error { c.move(); return nil }

// What is not found below a directory is not gone: somebody may have moved it.
func TestTreeThatIsMovedDuringItsDeleteIsNotGone(t *testing.T) {
	t.Parallel()
	b, err := openBinds(t.TempDir())
	must(t, err)
	defer b.close()
	must(t, b.root.MkdirAll("web/data", 0o700))
	move := sync.OnceFunc(func() { b.root.Rename("web", "away") })
	if err := b.erase(movingContext{t.Context(), move}, "web"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the error is %v", err)
	}
}

// A customer nests directories by the thousand, wide and deep.
func TestTreeOfAnyShapeIsEmptiedWithFewDescriptors(t *testing.T) {
	t.Parallel()
	dir := tempInMemory(t)
	outside := filepath.Join(dir, "outside")
	must(t, errors.Join(os.WriteFile(outside, nil, 0o600), os.Mkdir(dir+"/tree", 0o700)))
	depth := 1500
	if brief() {
		depth = 400
	}
	below := openTree(t, dir+"/tree")
	for depth := range depth {
		err := errors.Join(below.Symlink(outside, "link"), below.WriteFile("file", nil, 0o600))
		for i := range depth % 5 {
			err = errors.Join(err, below.MkdirAll(fmt.Sprintf("%d/with/some/below", i), 0o700))
		}
		err = errors.Join(err, below.Mkdir("deeper", 0o700))
		deeper, openErr := below.OpenRoot("deeper")
		must(t, errors.Join(err, openErr))
		below.Close()
		below = deeper
	}
	below.Close()
	ctx := &countingContext{Context: t.Context(), dir: dir}
	must(t, removeContents(ctx, openDirectory(t, dir), "tree"))
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

func TestLinkIsNotOpenedBelow(t *testing.T) {
	t.Parallel()
	tree := openDirectory(t, t.TempDir())
	must(t, errors.Join(os.Mkdir(tree.Name()+"/other", 0o700), os.Symlink("other", tree.Name()+"/id")))
	if _, err := openBelow(tree, "id"); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("the error is %v", err)
	}
	dir, err := openBelow(tree, "other")
	must(t, err)
	dir.Close()
}

func openDirectory(t testing.TB, path string) *os.File {
	t.Helper()
	dir, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { dir.Close() })
	return dir
}

// Such an error has no number.
func TestPathThatLeavesTheRootIsAnInternalError(t *testing.T) {
	t.Parallel()
	_, d := startWithService(t)
	record := filepath.Join(d.binds, recordDir, "web")
	must(t, errors.Join(os.Remove(record), os.Symlink("/etc/passwd", record)))
	d.do(t, "GET", "/service/web/params", "").want(t, 500, "internal")
}
