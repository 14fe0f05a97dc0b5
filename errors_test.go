package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

// errorsGo is what shows only in texts that Go or its HTTP library made for programmers.
var errorsGo = regexp.MustCompile(`%!|0x[0-9a-f]|\bstruct\b|\b(json|http|tar|gzip|flate|main|os|fs|io|net|container|syscall): |` +
	`\b(container|main|json|image)\.[A-Z]|\bGo (value|struct)|\bunmarshal|<nil>|nil pointer|goroutine|127\.0\.0\.1:\d+->|https?://%2F|openat|renameat`)

// errorsClean fails if an error's body tells what is none of the client's business.
func errorsClean(t testing.TB, d *daemon, body string) {
	t.Helper()
	var text struct{ Error struct{ Description string } }
	if err := json.Unmarshal([]byte(body), &text); err != nil {
		t.Errorf("no JSON: %s", body)
	}
	key, _ := os.ReadFile(filepath.Join(filepath.Dir(d.binds), "corekey.bin"))
	for _, secret := range []string{d.key, strings.TrimRight(d.key, "="), string(key), d.binds, filepath.Dir(d.binds), os.TempDir() + "/", "/var/lib", "TOKEN"} {
		if strings.Contains(text.Error.Description, secret) {
			t.Errorf("%q is in %s", secret, body)
		}
	}
	if found := errorsGo.FindString(text.Error.Description); found != "" {
		t.Errorf("%q is in %s", found, body)
	}
}

func TestErrorsTellNothingOfTheInside(t *testing.T) {
	t.Parallel()
	source := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/404":
			w.WriteHeader(404)
		case "/loop":
			w.Header().Set("Location", "/loop?TOKEN")
			w.WriteHeader(302)
		case "/nowhere":
			w.Header().Set("Location", "http://\x7f%zz/")
			w.WriteHeader(302)
		case "/file":
			w.Header().Set("Location", "file:///etc/TOKEN")
			w.WriteHeader(302)
		case "/private":
			w.Header().Set("Location", "http://10.0.0.1/TOKEN")
			w.WriteHeader(302)
		case "/port":
			w.Header().Set("Location", "http://127.0.0.1:1/TOKEN")
			w.WriteHeader(302)
		case "/name":
			w.Header().Set("Location", "http://nowhere.invalid/TOKEN")
			w.WriteHeader(302)
		case "/tls":
			w.Header().Set("Location", "https://"+r.Host+"/TOKEN")
			w.WriteHeader(302)
		case "/cut":
			w.Header().Set("Content-Length", "1000")
			w.Write(tgz(file("a", "b")))
		case "/text":
			io.WriteString(w, "no archive")
		case "/gzip":
			w.Write(gzipped([]byte("no tar archive")))
		case "/up":
			w.Write(tgz(file("../a", "b")))
		case "/link":
			w.Write(tgz(symlink("a", "/etc"), file("a/b", "c")))
		case "/over":
			w.Write(tgz(dir("a"), file("a/b", ""), file("a", "b")))
		case "/large":
			w.Write(tgz(file("a", strings.Repeat("b", 2<<20))))
		}
	})
	e := newFakeEngine(t)
	e.addImage("img:1")
	d := startDaemon(t, e.host(), func(c *config) {
		c.fetchAllow, c.maxBindBytes, c.maxImageBytes = networks("127.0.0.0/8"), 1<<20, 64<<10
	})
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	if err := os.MkdirAll(filepath.Join(d.binds, "taken", "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	type request struct{ method, path, body string }
	requests := []request{
		{"GET", "/nowhere", ""}, {"PUT", "/service", ""}, {"GET", "/service/%00", ""}, {"GET", "/service/" + strings.Repeat("a", 1000), ""},
		{"GET", "/service/nobody", ""}, {"DELETE", "/service/nobody", ""}, {"GET", "/service/nobody/stats", ""},
		{"POST", "/service/nobody/ctl", `{"op":"kill"}`}, {"POST", "/service/web/ctl", `{"op":"explode"}`},
		{"POST", "/service/web/ctl", `{"op":5}`}, {"POST", "/service/web/ctl", `{"ops":"start"}`}, {"GET", "/service/web/stats?stream=x", ""},
		{"PATCH", "/service/nobody/env", `{"A":"1"}`}, {"PATCH", "/service/web/env", `{"A":1}`}, {"PATCH", "/service/web/env", `[1]`},
		{"PATCH", "/service/web/env", `null`}, {"PATCH", "/service/web/env", `{"A=\u0000":"1"}`},
		{"PATCH", "/service/web/env", `{"A":1e999}`}, {"PATCH", "/service/web/env", strings.Repeat(" ", 2<<20)},
		{"POST", "/docker/image", ""}, {"POST", "/docker/image", "no tar"}, {"POST", "/docker/image", wholeTar()[:700]},
		{"POST", "/docker/image", wholeTar() + strings.Repeat("\x00", 64<<10)}, {"POST", "/docker/image", strings.Replace(wholeTar(), "hello", "jello", 1)},
		{"POST", "/service", createBodyJSON("web", "")}, {"POST", "/service", createBodyJSON("taken", "")},

		{"POST", "/service", createBodyJSON("new", `"image":"missing:1"`)}, {"POST", "/service", createBodyJSON("new", `"image":"sha256:00"`)},
		{"POST", "/service", createBodyJSON("new", `"max_ram":1e99`)}, {"POST", "/service", createBodyJSON("new", `"max_ram":1.5`)},
		{"POST", "/service", createBodyJSON("new", `"port_map":{"1/tcp":{"HostPort":1}}`)},
		{"POST", "/service", createBodyJSON("new", `"port_map":{"1/tcp":[{"Host":"1"}]}`)},
		{"POST", "/service", createBodyJSON("new", `"port_map":{"1/tcp":5}`)}, {"POST", "/service", createBodyJSON("new", `"port_map":[]`)},
		{"POST", "/service", createBodyJSON("new", `"cmd":"a"`)}, {"POST", "/service", createBodyJSON("new", `"tty":"a"`)},
		{"POST", "/service", createBodyJSON("new", `"bind_contents":"http://\u007f/TOKEN"`)},
		{"POST", "/service", createBodyJSON("new", `"bind_contents":"ftp://TOKEN@h/"`)},
		{"POST", "/service", `{"type":"raw","params":5}`}, {"POST", "/service", `{"type":"raw","params":{"id":5}}`}, {"POST", "/service", `{`},
		{"POST", "/service", `{"type":"cooked","params":{}}`}, {"POST", "/service", "\x00"}, {"POST", "/service", `{} {}`},
	}
	for _, bad := range badParams {
		requests = append(requests, request{"POST", "/service", createBodyJSON("new", bad.extra)})
	}
	for _, path := range strings.Fields("404 loop nowhere file private port name tls cut text gzip up link over large") {
		requests = append(requests, request{"POST", "/service", createBodyJSON("new", fmt.Sprintf(`"bind_contents":"%s/%s?TOKEN"`, source.URL, path))})
	}
	for _, r := range requests {
		a := d.do(t, r.method, r.path, r.body)
		if a.status < 400 {
			t.Errorf("%s %s %.100q: status %d", r.method, r.path, r.body, a.status)
			continue
		}
		a.want(t, a.status)
		errorsClean(t, d, a.body)
	}
	without, _ := sendRaw(t, d, "GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	errorsClean(t, d, without.body)

	// Our own fault.
	if err := os.RemoveAll(d.binds); err != nil {
		t.Fatal(err)
	}
	a := d.do(t, "POST", "/service", createBodyJSON("new", "")).want(t, 500)
	errorsClean(t, d, a.body)

	// What the engine says is passed on, for operators: as it is, but no more than they read.
	for message, passed := range map[string]string{
		`invalid mount config: ` + d.binds:                              `invalid mount config: ` + d.binds,
		`open /var/lib/docker/overlay2/x/merged/y: not a directory`:     `overlay2/x/merged/y: not a directory`,
		`denied: <html>` + strings.Repeat("é", 4000) + "the end":        "denied: <html>é",
		strings.Repeat("\x20", 512-len("engine: ")-1) + "é, much later": "engine: ",
	} {
		for engines, ours := range map[int]int{200: 502, 400: 400, 404: 502, 500: 502} {
			e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, "/start") && !strings.HasSuffix(r.URL.Path, "/images/create") {
					return false
				}
				io.Copy(io.Discard, r.Body)
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(engines)
				json.NewEncoder(w).Encode(map[string]string{"message": message, "error": message})
				return true
			})
			answers := []answer{d.do(t, "POST", "/docker/image", wholeTar())}
			if engines != 200 { // such an answer ends well for all but images
				answers = append(answers, d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`))
			}
			for _, a := range answers {
				a.want(t, ours, "engine: ")
				if n := len(description(t, a)); n > 512+len("…") || !utf8.ValidString(a.body) || !strings.Contains(description(t, a), passed) {
					t.Errorf("%d bytes: %s", n, a.body)
				}
			}
		}
	}
	e.setIntercept(nil)

	// So is what the client sent, as far as it is quoted.
	long := strings.Repeat("\x01", 100_000)
	quoted, _ := json.Marshal(long)
	for _, r := range []request{
		{"PATCH", "/service/web/env", `{` + string(quoted) + `:1}`}, {"POST", "/service", `{` + string(quoted) + `:1}`},
		{"POST", "/service", createBodyJSON("new", `"port_map":{`+string(quoted)+`:{"HostPort":"1"}}`)},
	} {
		if a := d.do(t, r.method, r.path, r.body).want(t, 400); len(a.body) > 10_000 {
			t.Errorf("an error of %d bytes", len(a.body))
		}
	}
}

// Neither our addresses nor our name servers' are anybody's business.
func TestFailedDownloadNamesNoAddressOfOurs(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() { // ends with the listener
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 1))
			conn.(*net.TCPConn).SetLinger(0) // a reset
			conn.Close()
		}
	}()
	e := newFakeEngine(t)
	e.addImage("img:1")
	d := startDaemon(t, e.host(), func(c *config) { c.fetchAllow = networks("127.0.0.0/8") })
	contents := fmt.Sprintf(`"bind_contents":"http://%s/"`, listener.Addr())
	got := description(t, d.do(t, "POST", "/service", createBodyJSON("web", contents)).want(t, 502))
	if want := "bind_contents: cannot download: connection reset by peer"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	for name, test := range map[string]struct {
		err  net.DNSError
		want string
	}{
		"no such name": {net.DNSError{Err: "no such host", Name: "n", Server: "10.0.0.1:53", IsNotFound: true}, "no such host"},
		"no server":    {net.DNSError{Err: "dial udp 10.0.0.1:53: connect: connection refused", Server: "10.0.0.1:53"}, "the host's name cannot be looked up"},
		"a silent one": {net.DNSError{Err: "read udp 10.0.0.2:3->10.0.0.1:53: i/o timeout", IsTimeout: true}, "the host's name cannot be looked up"},
		"given up":     {net.DNSError{Err: "operation was canceled", UnwrapErr: context.Canceled}, "the host's name cannot be looked up"},
	} {
		err := fetchError(t.Context(), &url.Error{Op: "Get", URL: "http://n/TOKEN", Err: &net.OpError{Op: "dial", Err: &test.err}})
		if got := err.Error(); got != "bind_contents: cannot download: "+test.want {
			t.Errorf("%s: %q", name, got)
		}
	}
}
