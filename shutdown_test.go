//go:build integration

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
)

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
	logged := fmt.Sprintf("remote=%s\n", w.lastFrom.Load())
	if !deathPoll(20*time.Second, func() bool { return w.daemon.log.contains(logged) }) {
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
			commits := strings.HasSuffix(call.name, "/rename")
			download := func(r *http.Request) { leave(); <-r.Context().Done() }
			if !commits {
				w.onDownload.Store(&download)
			}
			w.sendAndLeave(t, ctx, create.request)
			want := deathState{}
			if commits {
				want = create.new // it was too late to leave
			}
			if got := w.look(t); !got.isOneOf([]deathState{want}, "") {
				t.Errorf("left %+v, want %+v\n%s", got, want, w.daemon.log)
			}
			if !commits {
				w.mustSend(t, create.request, http.StatusCreated)
			}
			w.mustSend(t, deathDelete, http.StatusNoContent)
		})
	}
}

func TestOtherChangesFinishWhenTheirClientLeaves(t *testing.T) {
	t.Parallel()
	w := newDeathWorld(t)
	for _, op := range deathOps[1:] {
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
		answered <- w.send(context.Background(), deathRequest{"POST", "/service/ID/ctl", `{"op":"stop"}`})
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
		{"second PATCH", "POST /containers/create"},
		{"restart", "DELETE /containers/*"},
		{"DELETE", "DELETE /containers/*"},
	} {
		t.Run(half.op, func(t *testing.T) {
			op := deathOps[slices.IndexFunc(deathOps, func(op *deathOp) bool { return op.name == half.op })]
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
	w.mustSend(t, deathCreate, http.StatusInternalServerError)
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

func TestPatchThatFailsKeepsTheEarlierOne(t *testing.T) {
	t.Parallel()
	w := newDeathWorld(t)
	w.begin(t, &deathOp{prepare: []deathRequest{deathCreate, deathStart, deathPatch1}})
	w.proxy.setHook(func(r *http.Request) (*http.Response, error) {
		if !strings.HasSuffix(r.URL.Path, "/containers/create") {
			return w.proxy.transport.RoundTrip(r)
		}
		return &http.Response{StatusCode: http.StatusInternalServerError, Header: http.Header{"Content-Type": {"application/json"}},
			Body: io.NopCloser(strings.NewReader(`{"message":"no space left"}`))}, nil
	})
	w.mustSend(t, deathPatch2, http.StatusBadGateway)
	w.proxy.setHook(nil)
	w.mustSend(t, deathRestart, http.StatusNoContent)
	want := deathState{current: "pending", files: "all"}
	if got := w.look(t); !got.isOneOf([]deathState{want}, got.volumes) {
		t.Errorf("after the restart: %+v, want %+v", got, want)
	}
	w.mustSend(t, deathDelete, http.StatusNoContent)
}

// The engine can finish the create call of a PATCH whose daemon died when the next one
// has already deleted the service.
func TestPatchThatTakesEffectAfterDeleteDoesNotBringTheServiceBack(t *testing.T) {
	t.Parallel()
	w := newDeathWorld(t)
	w.begin(t, &deathOp{prepare: []deathRequest{deathCreate, deathStart, deathPatch1}})
	w.daemon.kill()
	if err := w.engine.ContainerRemove(t.Context(), w.id, container.RemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(w.binds + "/" + w.id); err != nil {
		t.Fatal(err)
	}
	w.start(t)
	if got := w.look(t); got != (deathState{}) {
		t.Errorf("left %+v, want nothing", got)
	}
}
