package main

import (
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
)

// wrongKeys are values of the header, each as its lines, that are not the one good key.
func wrongKeys(key []byte) map[string]string {
	good := base64.StdEncoding.EncodeToString(key)
	header := func(value string) string { return "X-Duxcore-CoreKey: " + value + "\r\n" }
	encode := func(key []byte) string { return header(base64.StdEncoding.EncodeToString(key)) }
	other := append([]byte(nil), key...)
	other[len(other)-1] ^= 1
	return map[string]string{
		"none":               "",
		"empty":              header(""),
		"padding only":       header("===="),
		"one bit wrong":      encode(other),
		"first 16 bytes":     encode(key[:16]),
		"all but one byte":   encode(key[:len(key)-1]),
		"one byte more":      encode(append(append([]byte(nil), key...), 0)),
		"key twice":          header(good) + header(good),
		"key then empty":     header(good) + header(""),
		"wrong then key":     encode(other) + header(good),
		"other case, twice":  header(good) + "x-duxcore-corekey: " + good + "\r\n",
		"joined by a comma":  header(good + "," + good),
		"doubled":            header(good + good),
		"space inside":       header(good[:8] + " " + good[8:]),
		"tab inside":         header(good[:8] + "\t" + good[8:]),
		"folded":             header(good[:8] + "\r\n " + good[8:]),
		"not padded":         header(strings.TrimRight(good, "=")),
		"padded more":        header(good + "="),
		"URL-safe":           header(base64.URLEncoding.EncodeToString(key)),
		"other last bits":    header(good[:len(good)-2] + "d="),
		"lower case":         header(strings.ToLower(good)),
		"hex":                header(hex.EncodeToString(key)),
		"quoted":             header(`"` + good + `"`),
		"bearer":             header("Bearer " + good),
		"authorization":      "Authorization: Bearer " + good + "\r\n",
		"another name":       "X-Duxcore-Core-Key: " + good + "\r\n",
		"underscores":        "X_Duxcore_CoreKey: " + good + "\r\n",
		"basic":              "Authorization: Basic " + good + "\r\n",
		"cookie":             "Cookie: X-Duxcore-CoreKey=" + good + "\r\n",
		"key of another one": encode([]byte("0123456789abcdef0123456789abcdef")),
	}
}

// Every line of the route table, and everything that is none, with every wrong key.
func TestNothingWithoutTheCoreKey(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addImage("img:1")
	keyFile := filepath.Join(t.TempDir(), "corekey.bin")
	must(t, os.WriteFile(keyFile, plusSlashKey, 0o600))
	d := startDaemon(t, e.host(), func(c *config) { c.coreKeyPath = keyFile })
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	before := len(e.calls())

	requests := []string{
		"GET /", "GET /nothing", "GET /v1", "GET /v2/service", "DELETE /service", "PUT /service/web",
		"GET /docker/image", "OPTIONS *", "OPTIONS /service", "TRACE /service", "HEAD /service", "BREW /health",
		"CONNECT example.com:80", "CONNECT /service", "GET //", "GET //service", "GET /../", "GET /../service",
		"GET /service/", "GET /service//ctl", "GET /service/.", "GET /service/..", "GET /service/%2e%2e",
		"GET /service/%2F", "GET /service/%00", "GET http://127.0.0.1/service", "GET /health?x=1",
		"GET /service/web;x=1", "GET /favicon.ico",
	}
	for _, rt := range (&server{}).routes() {
		method, pattern, _ := strings.Cut(rt.pattern, " ")
		path := strings.ReplaceAll(pattern, "{id}", "web")
		requests = append(requests, method+" "+path, method+" /v1"+path)
	}
	for name, header := range wrongKeys(plusSlashKey) {
		for _, request := range requests {
			a, closed := sendRaw(t, d,
				request+" HTTP/1.1\r\nHost: h\r\n"+header+"Content-Length: 14\r\n\r\n"+`{"op":"start"}`)
			if body := strings.TrimSuffix(a.body, "\n"); a.status != 401 ||
				(body != unauthorizedBody && !strings.HasPrefix(request, "HEAD")) {
				t.Fatalf("%s with the key %s: %d %s", request, name, a.status, a.body)
			}
			if !closed {
				t.Errorf("%s with the key %s: the connection stays open", request, name)
			}
		}
	}
	e.wantAskedNothing(t, before)
	d.do(t, "GET", "/service/web", "").want(t, 200)
}

// The answer comes before the body does, and says that no more is wanted.
func TestBodyWithoutTheCoreKeyIsNotRead(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	before := len(e.calls())
	for _, framing := range []string{"Content-Length: 17179869184\r\n", "Transfer-Encoding: chunked\r\n",
		"Content-Length: 9\r\nExpect: 100-continue\r\n"} {
		a, closed := sendRaw(t, d, "POST /docker/image HTTP/1.1\r\nHost: h\r\n"+framing+"\r\n")
		if a.status != 401 || !closed {
			t.Errorf("%q: status %d, closed %v", framing, a.status, closed)
		}
	}
	e.wantAskedNothing(t, before)
}

func TestMissingCoreKeyIsCreated(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "corekey.bin")
	e := newFakeEngine(t)
	use := func(c *config) { c.coreKeyPath = path }
	d := startDaemon(t, e.host(), use)
	d.do(t, "GET", "/health", "").want(t, 204)
	info, err := os.Stat(path)
	if err != nil || info.Size() != 32 || info.Mode() != 0o600 {
		t.Fatalf("%v, %v", info, err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("beside the key lie %v", entries)
	}
	if !strings.Contains(d.log.String(), path) {
		t.Errorf("the log does not say where the key is: %s", d.log)
	}
	must(t, d.stop())
	again := startDaemon(t, e.host(), use)
	if again.key != d.key {
		t.Error("the next start replaced the key")
	}
	again.do(t, "GET", "/health", "").want(t, 204)
}

func TestCoreKeyThatCannotBeWrittenLeavesNothing(t *testing.T) {
	t.Parallel()
	program, err := shipped()
	must(t, err)
	dir := t.TempDir()
	out, err := exec.Command("sh", "-c",
		`ulimit -f 0; exec "$0" -addr 127.0.0.1:0 -corekey "$1/corekey.bin" -binds "$1/binds"`,
		fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), program.Fd()), dir).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "cannot create the core key: write "+dir+"/corekey.bin") {
		t.Errorf("the daemon ended with %v: %s", err, out)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("it left %v, %v", left, err)
	}
}

// A power cut on ext4 cannot show that the directory is synced, because fsync of a new file there syncs its
// name too.
func TestCoreKeyWhoseDirectoryCannotBeSyncedIsNotCreated(t *testing.T) {
	t.Parallel()
	const nobody = 65534
	dir := t.TempDir()
	t.Cleanup(func() { os.Chmod(dir, 0o700) })
	// it can be written, not opened
	must(t, cmp.Or(os.Chmod(filepath.Dir(dir), 0o755), os.Chmod(dir, 0o300)))
	created := make(chan error)
	go func() {
		if os.Geteuid() == 0 { // root may open every directory
			runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
			os.Chown(dir, nobody, nobody)
			syscall.RawSyscall(syscall.SYS_SETFSUID, nobody, 0, 0)
		}
		_, err := createCoreKey(filepath.Join(dir, "corekey.bin"))
		created <- err
	}()
	if err := <-created; !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "open "+dir+":") {
		t.Errorf("it ended with %v", err)
	}
	os.Chmod(dir, 0o700)
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("it left %v, %v", left, err)
	}
}

func TestBadCoreKeyFileStopsTheDaemon(t *testing.T) {
	t.Parallel()
	const secret = "KEYMARK"
	for _, test := range []struct {
		name string
		make func(path string) error
	}{
		{"empty", func(path string) error { return os.WriteFile(path, nil, 0o600) }},
		{"one byte", func(path string) error { return os.WriteFile(path, []byte("K"), 0o600) }},
		{"15 bytes", func(path string) error { return os.WriteFile(path, []byte(secret+"01234567"), 0o600) }},
		{"4097 bytes", func(path string) error {
			return os.WriteFile(path, []byte(strings.Repeat(secret+"0", 513)[:4097]), 0o600)
		}},
		{"a directory", func(path string) error { return os.Mkdir(path, 0o700) }},
		{"a device", func(path string) error { return os.Symlink("/dev/zero", path) }},
		{"a link to nothing", func(path string) error { return os.Symlink("nothing", path) }},
		{"a link to itself", func(path string) error { return os.Symlink(path, path) }},
		// Root may open any file; this one is regular, and reading it fails.
		{"unreadable", func(path string) error { return os.Symlink("/proc/self/mem", path) }},
		{"in no directory", func(path string) error { return os.Remove(filepath.Dir(path)) }},
		{"below a file", func(path string) error {
			return errors.Join(os.Remove(filepath.Dir(path)), os.WriteFile(filepath.Dir(path), nil, 0o600))
		}},
	} {
		path := filepath.Join(t.TempDir(), "keys", "corekey.bin")
		must(t, os.Mkdir(filepath.Dir(path), 0o700))
		must(t, test.make(path))
		before, _ := os.Lstat(path)
		log, err := startError(t, func(c *config) { c.coreKeyPath = path })
		if err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: the daemon ended with %v, which does not name the file", test.name, err)
			continue
		}
		if strings.Contains(err.Error()+log, secret) {
			t.Errorf("%s: the key is in the error or the log: %v %s", test.name, err, log)
		}
		if after, _ := os.Lstat(path); before != nil &&
			(!os.SameFile(before, after) || after.ModTime() != before.ModTime()) {
			t.Errorf("%s: the file was changed", test.name)
		}
	}
}

func TestCoreKeyOfEveryAllowedLengthWorks(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	for _, length := range []int{16, 17, 18, 64, 4096} {
		path := filepath.Join(t.TempDir(), "corekey.bin")
		must(t, os.WriteFile(path, []byte(strings.Repeat("\n", length)), 0o600))
		d := startDaemon(t, e.host(), func(c *config) { c.coreKeyPath = path })
		d.do(t, "GET", "/health", "").want(t, 204)
	}
}

func TestCoreKeyThatOthersCanReadIsAWarning(t *testing.T) {
	t.Parallel()
	for mode, warned := range map[os.FileMode]bool{0o600: false, 0o400: false, 0o640: true, 0o604: true,
		0o644: true} {
		path := filepath.Join(t.TempDir(), "corekey.bin")
		must(t, errors.Join(os.WriteFile(path, plusSlashKey, 0o600), os.Chmod(path, mode)))
		_, d := start(t, func(c *config) { c.coreKeyPath = path })
		if got := strings.Contains(d.log.String(), "others can read the core key"); got != warned {
			t.Errorf("mode %v: warned is %v", mode, got)
		}
		d.do(t, "GET", "/health", "").want(t, 204)
	}
}

// CVE-2026-52855: the secret of the node must not leave it in anything it makes.
func TestCoreKeyLeavesNoTrace(t *testing.T) {
	t.Parallel()
	const key = "the core's key, in plain letters"
	path := filepath.Join(t.TempDir(), "corekey.bin")
	must(t, os.WriteFile(path, []byte(key), 0o644))
	e := newFakeEngine(t)
	e.addImage("img:1")
	var seen syncBuffer // all that the engine and the server of the contents get, and all that the client gets
	record := func(r *http.Request) {
		dump, _ := httputil.DumpRequest(r, true) // one body is broken off
		seen.Write(dump)
	}
	e.setIntercept(func(_ http.ResponseWriter, r *http.Request) bool { record(r); return false })
	contents := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		record(r)
		http.Redirect(w, r, "/again", http.StatusFound)
	}))
	defer contents.Close()
	d := startDaemon(t, e.host(), func(c *config) {
		c.coreKeyPath, c.fetchAllow = path, []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	})
	for _, call := range []struct{ method, path, body string }{
		{"POST", "/service", createBodyJSON("web", "")}, {"POST", "/service", createBodyJSON("web", "")},
		{"POST", "/service", createBodyJSON("other", `"bind_contents":"`+contents.URL+`"`)},
		{"POST", "/service", "{"}, {"POST", "/service/web/ctl", `{"op":"start"}`},
		{"PATCH", "/service/web/env", `{"A":"1"}`}, {"POST", "/service/web/ctl", `{"op":"restart"}`},
		{"GET", "/service/web", ""}, {"GET", "/service", ""}, {"POST", "/docker/image", wholeTar()},
		{"POST", "/docker/image", "x"}, {"GET", "/nothing", ""}, {"PUT", "/service", ""},
		{"DELETE", "/service/web", ""}, {"DELETE", "/service/web", ""},
	} {
		a := d.do(t, call.method, call.path, call.body)
		fmt.Fprintln(&seen, a.header, a.body)
	}
	if !strings.Contains(seen.String(), "GET /again") {
		t.Error("the redirect was not followed")
	}
	must(t, d.stop())
	all := seen.String() + d.log.String()
	sum := sha256.Sum256([]byte(key))
	for _, form := range []string{key, d.key, strings.TrimRight(d.key, "="), hex.EncodeToString([]byte(key)),
		hex.EncodeToString(sum[:]), base64.StdEncoding.EncodeToString(sum[:]), "Corekey:", "CoreKey:"} {
		if strings.Contains(all, form) {
			t.Errorf("%q is in what the daemon sent or logged", form)
		}
	}
}
