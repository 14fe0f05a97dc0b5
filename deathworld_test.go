//go:build integration

package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
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

// deathState is all that there is of a world's one service. Strays are what should be there in no state:
// other containers, directories, marks, drafts of records, and whatever differs between the record and the
// container.
type deathState struct {
	current, next string // the variable A of the container, and of what is pending in the record
	files         string // in the bind directory: "all", empty without the directory, or what is wrong
	volumes       string // their names
	strays        string
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

type deathRequest struct{ method, path, body string }

var (
	deathCreate = deathRequest{"POST", "/service", `{"type":"raw","params":{"id":"ID","image":"IMAGE",` +
		`"bind_dir":"/data","bind_contents":"CONTENTS","env":["A=old"]}}`}
	deathStart   = deathRequest{"POST", "/service/ID/ctl", `{"op":"start"}`}
	deathRestart = deathRequest{"POST", "/service/ID/ctl", `{"op":"restart"}`}
	deathPut     = deathRequest{"PUT", "/service/ID",
		`{"type":"raw","params":{"id":"ID","image":"IMAGE","bind_dir":"/data","env":["A=pending"]}}`}
	deathPatch  = deathRequest{"PATCH", "/service/ID/env", `{"A":"new"}`}
	deathDelete = deathRequest{"DELETE", "/service/ID", ""}
)

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
	must(t, err)
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

// ofRound reports whether a call is a round's, which a daemon begins once a minute, and not an operation's.
func ofRound(r *http.Request) bool {
	return strings.HasSuffix(r.URL.Path, "/images/json") ||
		strings.Contains(r.URL.Query().Get("filters"), labelBinds)
}

func (p *deathProxy) RoundTrip(r *http.Request) (*http.Response, error) {
	if hook := p.hook.Load(); hook != nil && !strings.HasSuffix(r.URL.Path, "/_ping") {
		return (*hook)(r)
	}
	return p.transport.RoundTrip(r)
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
	dir, binds, keyFile, key string
	engine                   *client.Client // past the proxy
	proxy                    *deathProxy
	contents                 *httptest.Server
	onDownload               atomic.Pointer[func(*http.Request)] // called when half of bind_contents was sent
	// each volume made of the image holds a file of this name
	image, marker string
	daemon        *deathDaemon
	alone         bool   // the daemon is root in a user namespace without any other user
	id            string // of the service of this moment
	count         int
}

// newDeathWorld starts the first daemon. Nothing of the world outlives t.
func newDeathWorld(t *testing.T) *deathWorld {
	t.Helper()
	dir, err := os.MkdirTemp("", "duxcore-death-") // t.TempDir would be too long for a socket's path
	must(t, err)
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		t.Fatal(err)
	}
	engine, err := client.NewClientWithOpts(client.FromEnv, client.WithAPIVersionNegotiation())
	must(t, err)
	key := make([]byte, 32)
	rand.Read(key)
	w := &deathWorld{dir: dir, binds: filepath.Join(dir, "binds"), keyFile: filepath.Join(dir, "corekey.bin"),
		key: base64.StdEncoding.EncodeToString(key), engine: engine, marker: "marker-" +
			strings.ToLower(rand.Text())}
	must(t, os.WriteFile(w.keyFile, key, 0o600))
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
		if err := w.engine.ContainerRemove(ctx, c.ID,
			container.RemoveOptions{Force: true, RemoveVolumes: true}); err != nil {
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
	name := "duxcore-test/" + w.marker
	importPast(t, w.engine, name, []string{"VOLUME /vol", `CMD ["/probe", "deaf", "/data"]`},
		imageFile("probe", buildProbe(t)), file("vol/"+w.marker, "here"))
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
	var entries []entry
	for name, content := range deathContents() {
		entries = append(entries, file(name, content))
	}
	return tgz(entries...)
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
	fill := strings.NewReplacer("ID", w.id, "IMAGE", w.image, "CONTENTS",
		w.contents.URL+"/contents.tar.gz").Replace
	request, err := http.NewRequestWithContext(ctx, r.method, w.daemon.url+fill(r.path),
		strings.NewReader(fill(r.body)))
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

// sendAgain sends a request until the engine is done with the last call of the daemon that was killed: until
// then it may refuse a name, or a removal, with a 409.
func (w *deathWorld) sendAgain(r deathRequest) (answer deathAnswer) {
	poll(func() bool {
		answer = w.send(context.Background(), r)
		return !strings.Contains(answer.body, `"kind":"`+kindEngineConflict.name+`"`)
	})
	return answer
}

func (w *deathWorld) mustSend(t *testing.T, r deathRequest, status int) {
	t.Helper()
	if answer := w.send(context.Background(), r); answer.status != status {
		t.Fatalf("%s %s: %+v, want %d\n%s", r.method, r.path, answer, status, w.daemon.log)
	}
}

func (w *deathWorld) containers(t *testing.T) []container.Summary {
	t.Helper()
	list, err := w.engine.ContainerList(context.Background(), container.ListOptions{All: true,
		Filters: filters.NewArgs(filters.Arg("label", labelBinds+"="+w.binds))})
	must(t, err)
	return list
}

// volumes returns the names of the volumes that were made of the world's image. The
// engine keeps no other sign of whose an anonymous volume is.
func (w *deathWorld) volumes(t *testing.T) (names []string) {
	t.Helper()
	all, err := w.engine.VolumeList(context.Background(), volume.ListOptions{})
	must(t, err)
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
		must(t, err)
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
	must(t, err)
	strays = append(strays, drafts...)
	record := w.record(t)
	if record.Revision != revision || variableA(record.Params.Env) != s.current {
		strays = append(strays, fmt.Sprintf("a record %q of A=%q beside a container %q", record.Revision,
			record.Params.Env, revision))
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
	must(t, err)
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
	if !pollFor(settleWait, func() bool {
		s = w.look(t)
		return s.isOneOf(allowed, volumes)
	}) {
		t.Fatalf("%s: %+v, want one of %+v with volumes %q\n%s", when, s, allowed, volumes, w.daemon.log)
	}
	return s
}

func (w *deathWorld) running(t *testing.T) bool {
	t.Helper()
	c, err := w.engine.ContainerInspect(context.Background(), w.id)
	must(t, err)
	return c.State.Running
}

// deathDaemon is one process of the daemon.
type deathDaemon struct {
	cmd    *exec.Cmd
	url    string
	log    *syncBuffer
	exited chan struct{}
}

// start starts a daemon on the world's bind root and waits until it listens.
func (w *deathWorld) start(t *testing.T) {
	t.Helper()
	w.spawn(t)
	pollFor(30*time.Second, func() bool { return w.daemon.log.url() != "" || w.daemon.wait(0) })
	if w.daemon.url = w.daemon.log.url(); w.daemon.url == "" {
		t.Fatalf("the daemon does not listen\n%s", w.daemon.log)
	}
}

func (w *deathWorld) spawn(t *testing.T) {
	t.Helper()
	if w.daemon != nil && strings.Contains(w.daemon.log.String(), "DATA RACE") {
		t.Errorf("the daemon has a data race:\n%s", w.daemon.log)
	}
	binary, err := deathBinary()
	must(t, err)
	d := &deathDaemon{log: &syncBuffer{}, exited: make(chan struct{})}
	d.cmd = exec.Command("/proc/self/fd/3", // which is the binary, for the process itself
		"-addr", "127.0.0.1:0", "-binds", w.binds, "-corekey", w.keyFile, "-fetch-allow", "127.0.0.0/8",
		"-stop-timeout", "5s")
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
	must(t, d.cmd.Start())
	go func() { // ends with the process
		d.cmd.Wait()
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

// deathBinary builds the daemon once, with the race detector. The file is open and has no name any more, so
// that nothing has to remove it.
var deathBinary = sync.OnceValues(func() (*os.File, error) {
	dir, err := os.MkdirTemp("", "duxcore-death-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-race", "-buildvcs=false", "-o", dir+"/daemon", ".")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("cannot build the daemon: %w\n%s", err, out)
	}
	return os.Open(dir + "/daemon")
})
