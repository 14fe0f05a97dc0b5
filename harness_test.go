package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
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
