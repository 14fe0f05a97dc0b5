package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// tempInMemory returns a directory in memory, where there is one: on a disk, the daemon's syncs
// take most of the time of a test with thousands of steps.
func tempInMemory(t testing.TB) string {
	t.Helper()
	memory := "/dev/shm"
	if _, err := os.Stat(memory); err != nil {
		memory = ""
	}
	dir, err := os.MkdirTemp(memory, "duxcore-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// daemon is one that runs, and how to reach it.
type daemon struct {
	url    string
	key    string // base64
	binds  string // absolute path
	log    *syncBuffer
	client *http.Client
	stop   func() error // stops it, once, and returns what run returned
}

// syncBuffer is a log that can be read while it is written.
type syncBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// startDaemon runs the daemon against the engine at dockerHost until the test ends.
func startDaemon(t testing.TB, dockerHost string, change func(*config)) *daemon {
	t.Helper()
	cfg, err := parseConfig(nil, func(string) (string, bool) { return "", false }, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cfg.addr, cfg.coreKey, cfg.binds = "127.0.0.1:0", filepath.Join(dir, "corekey.bin"), filepath.Join(dir, "binds")
	cfg.dockerHost = dockerHost
	if change != nil {
		change(&cfg)
	}
	d := &daemon{log: &syncBuffer{}, client: &http.Client{Transport: &http.Transport{}, Timeout: time.Minute}}
	ctx, cancel := context.WithCancel(context.Background())
	listening, ended := make(chan net.Addr, 1), make(chan error, 1)
	go func() {
		ended <- run(ctx, cfg, slog.New(slog.NewTextHandler(d.log, nil)), func(a net.Addr) { listening <- a })
	}()
	d.stop = sync.OnceValue(func() error {
		d.client.CloseIdleConnections()
		cancel()
		return <-ended
	})
	select {
	case addr := <-listening:
		d.url = "http://" + addr.String()
	case err := <-ended:
		cancel()
		t.Fatalf("the daemon did not start: %v", err)
	}
	t.Cleanup(func() {
		if err := d.stop(); err != nil {
			t.Errorf("the daemon ended with: %v", err)
		}
	})
	key, err := os.ReadFile(cfg.coreKey)
	if err != nil {
		t.Fatal(err)
	}
	d.key = base64.StdEncoding.EncodeToString(key)
	d.binds = cfg.binds
	return d
}

// bindDirs returns what is in a bind root: services' ids, and what is on its way out as ".gone/<id>".
func bindDirs(t testing.TB, binds string) (names []string) {
	t.Helper()
	for _, dir := range []string{"", goneDir} {
		entries, err := os.ReadDir(filepath.Join(binds, dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			if name := filepath.Join(dir, entry.Name()); name != goneDir {
				names = append(names, name)
			}
		}
	}
	return names
}

// answer is a response, read to its end.
type answer struct {
	status int
	header http.Header
	body   string
}

// request returns a request with the core key, to be changed and sent.
func (d *daemon) request(t testing.TB, method, path string, body io.Reader) *http.Request {
	t.Helper()
	r, err := http.NewRequest(method, d.url+path, body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-Duxcore-CoreKey", d.key)
	return r
}

func (d *daemon) send(t testing.TB, r *http.Request) answer {
	t.Helper()
	response, err := d.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{response.StatusCode, response.Header, string(body)}
}

func (d *daemon) do(t testing.TB, method, path, body string) answer {
	t.Helper()
	return d.send(t, d.request(t, method, path, strings.NewReader(body)))
}

// kindsOfErrors returns the status of each kind of error by its name.
var kindsOfErrors = sync.OnceValue(func() map[string]int {
	source, err := os.ReadFile("server.go")
	if err != nil {
		panic(err)
	}
	kinds := map[string]int{}
	for _, found := range regexp.MustCompile(`kind\{([0-9]{3}), "([a-z_]+)"\}`).FindAllStringSubmatch(string(source), -1) {
		kinds[found[2]], _ = strconv.Atoi(found[1])
	}
	return kinds
})

// want fails the test unless the answer has the status and the texts, and the one shape
// of errors if it is one.
func (a answer) want(t testing.TB, status int, substrings ...string) answer {
	t.Helper()
	if a.status != status {
		t.Fatalf("status %d, want %d; body %s", a.status, status, a.body)
	}
	for _, text := range substrings {
		if !strings.Contains(a.body, text) {
			t.Errorf("body %s, want %q in it", a.body, text)
		}
	}
	if status < 400 {
		return a
	}
	var shape struct {
		Error struct {
			Code                      int
			Reason, Kind, Description string
		}
	}
	decoder := json.NewDecoder(strings.NewReader(a.body))
	decoder.DisallowUnknownFields()
	err := decoder.Decode(&shape)
	if e := shape.Error; err != nil || e.Code != status || kindsOfErrors()[e.Kind] != status || e.Reason != http.StatusText(status) || e.Description == "" {
		t.Errorf("body %s is not an error of the one shape: %v", a.body, err)
	}
	if got := a.header.Get("Content-Type"); got != "application/json" {
		t.Errorf("an error's Content-Type is %q", got)
	}
	return a
}

// createBodyJSON returns a body of POST /service. Fields in extra, which may be empty,
// take the place of those of the same name.
func createBodyJSON(id, extra string) string {
	quoted, _ := json.Marshal(id)
	var fields []string
	for _, field := range []string{`"id":` + string(quoted), `"image":"img:1"`, `"bind_dir":"/data"`, extra} {
		name, _, _ := strings.Cut(field, ":")
		if field == extra || !strings.Contains(extra, name+":") {
			fields = append(fields, field)
		}
	}
	return `{"type":"raw","params":{` + strings.TrimSuffix(strings.Join(fields, ","), ",") + `}}`
}

// waitFor returns when the condition holds.
func waitFor(t testing.TB, what string, condition func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for every := time.Tick(2 * time.Millisecond); !condition(); {
		select {
		case <-every:
		case <-deadline:
			t.Fatalf("waited for 10 s: %s", what)
		}
	}
}

// bareServer returns a daemon's server on a root of its own, without the network and without
// a run that would settle: a test calls its operations.
func bareServer(t *testing.T, e *fakeEngine, change func(*config)) *server {
	t.Helper()
	cfg, err := parseConfig(nil, func(string) (string, bool) { return "", false }, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(&cfg)
	}
	binds, err := openBinds(tempInMemory(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(binds.close)
	engine, err := newEngine(e.host())
	if err != nil {
		t.Fatal(err)
	}
	if err := engine.meet(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { engine.api().Close() })
	life, end := context.WithCancel(context.Background())
	t.Cleanup(end)
	return newServer(life, life, cfg, coreKey{}, engine, binds, slog.New(slog.DiscardHandler))
}

// bareService returns such a server with a service web.
func bareService(t *testing.T) (*fakeEngine, *server) {
	t.Helper()
	e := newFakeEngine(t)
	e.addImage("img:1")
	s := bareServer(t, e, nil)
	if err := s.create(t.Context(), serviceParams{ID: "web", Image: "img:1", BindDir: "/data"}, ""); err != nil {
		t.Fatal(err)
	}
	return e, s
}

// countCalls returns how many calls have the text in them.
func countCalls(calls []string, text string) (count int) {
	for _, call := range calls {
		if strings.Contains(call, text) {
			count++
		}
	}
	return count
}

func wireDial(t testing.TB, d *daemon) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(d.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(time.Minute))
	return conn
}

// wireStatuses returns the status of each answer on conn until the daemon closes it.
func wireStatuses(t testing.TB, conn net.Conn) (statuses []int) {
	t.Helper()
	for reader := bufio.NewReader(conn); ; {
		response, err := http.ReadResponse(reader, nil)
		if err != nil {
			if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
				t.Errorf("the connection is still open after %v", statuses)
			}
			return statuses
		}
		io.Copy(io.Discard, response.Body)
		statuses = append(statuses, response.StatusCode)
	}
}

func wireStatus(t testing.TB, conn net.Conn) int {
	t.Helper()
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	return response.StatusCode
}

// wireProcess starts the daemon, built as it is shipped, as a process of its own, and
// returns its process id.
func wireProcess(t testing.TB, engineHost string, args ...string) (*daemon, int) {
	t.Helper()
	program, err := shipped()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	d := &daemon{log: &syncBuffer{}, binds: filepath.Join(dir, "binds"), client: &http.Client{Transport: &http.Transport{}, Timeout: time.Minute}}
	process := exec.Command(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), program.Fd()), append(args, "-addr", "127.0.0.1:0", "-corekey", filepath.Join(dir, "corekey.bin"), "-binds", d.binds)...)
	process.Env, process.Stderr = append(os.Environ(), "DOCKER_HOST="+engineHost), d.log
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		process.Process.Signal(syscall.SIGTERM)
		if err := process.Wait(); err != nil {
			t.Errorf("the daemon ended with: %v\n%s", err, d.log)
		}
	})
	address := regexp.MustCompile(`msg=listening addr=(\S+)`)
	waitFor(t, "the daemon listens", func() bool { return address.MatchString(d.log.String()) })
	d.url = "http://" + address.FindStringSubmatch(d.log.String())[1]
	key, err := os.ReadFile(filepath.Join(dir, "corekey.bin"))
	if err != nil {
		t.Fatal(err)
	}
	d.key = base64.StdEncoding.EncodeToString(key)
	return d, process.Process.Pid
}

// wireMemory returns what the process has in memory, and the most it ever had, in bytes.
func wireMemory(t testing.TB, pid int) (now, peak int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for field, value := range map[string]*int{"VmRSS": &now, "VmHWM": &peak} {
		found := regexp.MustCompile(field + `:\s+(\d+) kB`).FindSubmatch(status)
		if *value, err = strconv.Atoi(string(found[1])); err != nil {
			t.Fatal(err)
		}
		*value <<= 10
	}
	return now, peak
}
