package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Whoever still writes to a tree that is deleted can put a pipe where a directory was.
func TestPipeInThePlaceOfADirectoryIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	tree := openTree(t, dir)
	defer tree.Close()
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
	for _, target := range []string{"web", "../web", "/etc"} { // the second leads to the first from where it is on its way out
		e, d := startWithService(t)
		data := filepath.Join(d.binds, "web", "data")
		if err := errors.Join(os.WriteFile(data, []byte("precious"), 0o600), os.Symlink(target, filepath.Join(d.binds, "link"))); err != nil {
			t.Fatal(err)
		}
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

// A root that was moved, with a link left in its place, or that has another name now.
func TestMovedBindRootKeepsItsServices(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addImage("img:1")
	dir := t.TempDir()
	before, after := filepath.Join(dir, "binds"), filepath.Join(dir, "bigger")
	use := func(path string) func(*config) { return func(c *config) { c.binds = path } }
	d := startDaemon(t, e.host(), use(before))
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	d.do(t, "POST", "/service", createBodyJSON("empty", "")).want(t, 201)
	if err := errors.Join(d.stop(), os.WriteFile(before+"/web/data", []byte("precious"), 0o600), os.Rename(before, after), os.Symlink("bigger", before)); err != nil {
		t.Fatal(err)
	}
	if _, err := startError(t, func(c *config) { c.binds, c.dockerHost = after, e.host() }); err == nil || !strings.Contains(err.Error(), "-binds "+before) {
		t.Errorf("with the new path the daemon ends with: %v", err)
	}
	// It cannot know before its engine is there.
	e.close()
	d = startDaemon(t, e.host(), use(after))
	e.reopen()
	for _, request := range []struct{ method, path, body string }{
		{"GET", "/service", ""}, {"GET", "/service/web", ""}, {"DELETE", "/service/web", ""}, {"DELETE", "/service/empty", ""},
		{"POST", "/service", createBodyJSON("empty", "")}, {"POST", "/service", createBodyJSON("new", "")},
		{"PATCH", "/service/web/env", "{}"}, {"POST", "/service/web/ctl", `{"op":"start"}`}, {"GET", "/health", ""},
	} {
		d.do(t, request.method, request.path, request.body).want(t, 500)
	}
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	d = startDaemon(t, e.host(), use(before))
	if got := bindDirs(t, before); !slices.Equal(got, []string{"empty", "web"}) {
		t.Errorf("the root holds %q", got)
	}
	d.do(t, "GET", "/service/web", "").want(t, 200)
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	d.do(t, "DELETE", "/service/empty", "").want(t, 204)
	if got := bindDirs(t, after); len(got) > 0 || len(e.names()) > 0 {
		t.Errorf("left: %q, %q", got, e.names())
	}
}

// Another daemon's root may have become anything.
func TestBindRootOfAnotherDaemonThatCannotBeLookedAtHidesNothing(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	loop := filepath.Join(filepath.Dir(d.binds), "loop")
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	e.addForeign("theirs", map[string]string{labelService: "theirs", labelBinds: loop}, filepath.Join(loop, "theirs"))
	e.addForeign(nameNew+"half", map[string]string{labelService: "half", labelBinds: d.binds}, filepath.Join(d.binds, "half"))
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	d = startDaemon(t, e.host(), func(c *config) { c.binds = d.binds })
	if got := e.names(); !slices.Equal(got, []string{"theirs", "web"}) {
		t.Errorf("there are %q: nothing was settled", got)
	}
	d.do(t, "GET", "/service", "").want(t, 200, `"/web"`)
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	d.do(t, "DELETE", "/service/theirs", "").want(t, 404)
}

// Nothing is gone because the file system could not say that it is there.
func TestErrorOfTheFileSystemIsNoAbsence(t *testing.T) {
	t.Parallel()
	e, s := bareService(t)
	e.rename("web", "duxcore.now.web") // a start that died
	before := e.names()
	s.binds.root.Close() // now every look fails, with an error that is not ENOENT
	for name, do := range map[string]func() error{
		"settle": func() error { _, _, err := s.settle(t.Context(), "web"); return err },
		"DELETE": func() error { return s.change(t.Context(), t.Context(), "web", s.removeService) },
		"start":  func() error { return s.changeExisting(t.Context(), "web", s.start) },
		"create": func() error {
			return s.create(t.Context(), serviceParams{ID: "new", Image: "img:1", BindDir: "/data"}, "")
		},
	} {
		err := do()
		if kind, _ := describe(cmp.Or(err, errors.New("none"))); err == nil || kind.status < 500 {
			t.Errorf("%s: %v %v", name, kind, err)
		}
		if after := e.names(); !slices.Equal(after, before) {
			t.Fatalf("%s made %q of %q", name, after, before)
		}
	}
	for name, err := range map[string]error{
		"remove": s.removeService(t.Context(), "web", nil, nil), "free": s.binds.free("web"), "discard": s.binds.discard("web"),
		"allGone": func() error { _, err := s.binds.allGone(); return err }(),
	} {
		if kind, _ := describe(cmp.Or(err, errors.New("none"))); err == nil || kind.status < 500 {
			t.Errorf("%s: %v", name, err)
		}
	}
	tree := openTree(t, t.TempDir())
	u := &unpacker{root: tree, parent: tree, parentDir: "."}
	tree.Close()
	if err := u.placeLink("a", "b"); err == nil || errors.Is(err, errLinkTarget) {
		t.Errorf("an archive's link to what cannot be looked at: %v", err)
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
	open, _ := os.ReadDir("/proc/self/fd")
	count := 0
	for _, fd := range open {
		if path, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(path, c.dir) {
			count++
		}
	}
	c.most = max(c.most, count)
	return nil
}

// A customer nests directories by the thousand, wide and deep.
func TestTreeOfAnyShapeIsEmptiedWithFewDescriptors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	outside := filepath.Join(dir, "outside")
	if err := errors.Join(os.WriteFile(outside, nil, 0o600), os.Mkdir(dir+"/tree", 0o700)); err != nil {
		t.Fatal(err)
	}
	below := openTree(t, dir+"/tree")
	for depth := range 1500 {
		err := errors.Join(below.Symlink(outside, "link"), below.WriteFile("file", nil, 0o600))
		for i := range depth % 5 {
			err = errors.Join(err, below.MkdirAll(fmt.Sprintf("%d/with/some/below", i), 0o700))
		}
		err = errors.Join(err, below.Mkdir("deeper", 0o700))
		deeper, openErr := below.OpenRoot("deeper")
		if err = errors.Join(err, openErr); err != nil {
			t.Fatal(err)
		}
		below.Close()
		below = deeper
	}
	below.Close()
	ctx := &countingContext{Context: t.Context(), dir: dir}
	if err := empty(ctx, openTree(t, dir+"/tree")); err != nil {
		t.Fatal(err)
	}
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
