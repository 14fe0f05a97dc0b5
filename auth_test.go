package main

import (
	"bufio"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
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
	if err := os.WriteFile(keyFile, plusSlashKey, 0o600); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, e.host(), func(c *config) { c.coreKey = keyFile })
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	before := len(e.calls())

	requests := []string{
		"GET /", "GET /nothing", "GET /v1", "GET /v2/service", "DELETE /service", "PUT /service/web", "GET /docker/image",
		"OPTIONS *", "OPTIONS /service", "TRACE /service", "HEAD /service", "BREW /health", "CONNECT example.com:80",
		"CONNECT /service", "GET //", "GET //service", "GET /../", "GET /../service", "GET /service/", "GET /service//ctl",
		"GET /service/.", "GET /service/..", "GET /service/%2e%2e", "GET /service/%2F", "GET /service/%00",
		"GET http://127.0.0.1/service", "GET /health?x=1", "GET /service/web;x=1", "GET /favicon.ico",
	}
	for _, rt := range (&server{}).routes() {
		method, pattern, _ := strings.Cut(rt.pattern, " ")
		path := strings.ReplaceAll(pattern, "{id}", "web")
		requests = append(requests, method+" "+path, method+" /v1"+path)
	}
	for name, header := range wrongKeys(plusSlashKey) {
		for _, request := range requests {
			a, closed := sendRaw(t, d, request+" HTTP/1.1\r\nHost: h\r\n"+header+"Content-Length: 14\r\n\r\n"+`{"op":"start"}`)
			if body := strings.TrimSuffix(a.body, "\n"); a.status != 401 || (body != unauthorizedBody && !strings.HasPrefix(request, "HEAD")) {
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
	for _, framing := range []string{"Content-Length: 17179869184\r\n", "Transfer-Encoding: chunked\r\n", "Content-Length: 9\r\nExpect: 100-continue\r\n"} {
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
	use := func(c *config) { c.coreKey = path }
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
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	again := startDaemon(t, e.host(), use)
	if again.key != d.key {
		t.Error("the next start replaced the key")
	}
	again.do(t, "GET", "/health", "").want(t, 204)
}

// A daemon that died as it made the key has left a copy of it, or the key itself by a second name.
func TestStartRemovesWhatWasLeftOfMakingTheCoreKey(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "keys", "corekey.bin")
	dir := filepath.Dir(path)
	backup := filepath.Join(dir, ".corekey-2025-backup")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(path, plusSlashKey, 0o600), os.Link(path, dir+"/.corekey-1234567"),
		os.WriteFile(dir+"/.corekey-89", []byte("half"), 0o600), os.WriteFile(backup, plusSlashKey, 0o600)); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, newFakeEngine(t).host(), func(c *config) { c.coreKey = path })
	d.do(t, "GET", "/health", "").want(t, 204)
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 2 || left[0].Name() != filepath.Base(backup) || left[1].Name() != filepath.Base(path) {
		t.Errorf("there are %v, %v", left, err)
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
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := test.make(path); err != nil {
			t.Fatal(err)
		}
		before, _ := os.Lstat(path)
		log, err := startError(t, func(c *config) { c.coreKey = path })
		if err == nil || !strings.Contains(err.Error(), filepath.Dir(path)) {
			t.Errorf("%s: the daemon ended with %v", test.name, err)
			continue
		}
		if strings.Contains(err.Error()+log, secret) {
			t.Errorf("%s: the key is in the error or the log: %v %s", test.name, err, log)
		}
		if after, _ := os.Lstat(path); before != nil && (!os.SameFile(before, after) || after.ModTime() != before.ModTime()) {
			t.Errorf("%s: the file was changed", test.name)
		}
	}
}

func TestCoreKeyOfEveryAllowedLengthWorks(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	for _, length := range []int{16, 17, 18, 64, 4096} {
		path := filepath.Join(t.TempDir(), "corekey.bin")
		if err := os.WriteFile(path, []byte(strings.Repeat("\n", length)), 0o600); err != nil {
			t.Fatal(err)
		}
		d := startDaemon(t, e.host(), func(c *config) { c.coreKey = path })
		d.do(t, "GET", "/health", "").want(t, 204)
	}
}

func TestCoreKeyThatOthersCanReadIsAWarning(t *testing.T) {
	t.Parallel()
	for mode, warned := range map[os.FileMode]bool{0o600: false, 0o400: false, 0o640: true, 0o604: true, 0o644: true} {
		path := filepath.Join(t.TempDir(), "corekey.bin")
		if err := errors.Join(os.WriteFile(path, plusSlashKey, 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		d := startDaemon(t, newFakeEngine(t).host(), func(c *config) { c.coreKey = path })
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
	if err := os.WriteFile(path, []byte(key), 0o644); err != nil {
		t.Fatal(err)
	}
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
		c.coreKey, c.fetchAllow = path, []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	})
	for _, call := range []struct{ method, path, body string }{
		{"POST", "/service", createBodyJSON("web", "")}, {"POST", "/service", createBodyJSON("web", "")},
		{"POST", "/service", createBodyJSON("other", `"bind_contents":"`+contents.URL+`"`)},
		{"POST", "/service", "{"}, {"POST", "/service/web/ctl", `{"op":"start"}`}, {"PATCH", "/service/web/env", `{"A":"1"}`},
		{"POST", "/service/web/ctl", `{"op":"restart"}`}, {"GET", "/service/web", ""}, {"GET", "/service", ""},
		{"POST", "/docker/image", wholeTar()}, {"POST", "/docker/image", "x"}, {"GET", "/nothing", ""}, {"PUT", "/service", ""},
		{"DELETE", "/service/web", ""}, {"DELETE", "/service/web", ""},
	} {
		a := d.do(t, call.method, call.path, call.body)
		fmt.Fprintln(&seen, a.header, a.body)
	}
	if !strings.Contains(seen.String(), "GET /again") {
		t.Error("the redirect was not followed")
	}
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	all := seen.String() + d.log.String()
	sum := sha256.Sum256([]byte(key))
	for _, form := range []string{key, d.key, strings.TrimRight(d.key, "="), hex.EncodeToString([]byte(key)),
		hex.EncodeToString(sum[:]), base64.StdEncoding.EncodeToString(sum[:]), "Corekey:", "CoreKey:"} {
		if strings.Contains(all, form) {
			t.Errorf("%q is in what the daemon sent or logged", form)
		}
	}
}

// dialFrom connects to a listener from an address of the loopback network.
func dialFrom(t *testing.T, listener net.Listener, from string) net.Conn {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: time.Minute}
	conn, err := dialer.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// Whoever has had the time for his header leaves for who comes: the oldest, or, of an address that has
// many places, its own oldest. Such an address's next is closed when there is none, unless the core is there too.
func TestStrangersMakeRoomForEachOther(t *testing.T) {
	t.Parallel()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	s := newStrangers(inner, 8)
	ends := map[string]net.Conn{} // the daemon's, by the client's address
	come := func(from string) string {
		client := dialFrom(t, inner, from)
		conn, err := s.Accept()
		if err != nil {
			t.Fatal(err)
		}
		ends[client.LocalAddr().String()] = conn
		return client.LocalAddr().String()
	}
	here := func(client string) bool {
		return slices.ContainsFunc(s.here, func(o stranger) bool { return o.conn == ends[client] })
	}
	begin := time.Now()
	quiet := come("127.0.0.1")
	var crowd []string
	for range 7 {
		crowd = append(crowd, come("127.0.0.2"))
	}
	turnedAway := dialFrom(t, inner, "127.0.0.2")
	newcomer := come("127.0.0.3")
	if took := time.Since(begin); took < strangerTime || here(quiet) || !here(newcomer) || !here(crowd[0]) {
		t.Errorf("after %v the oldest of all is here: %v, the newcomer: %v, the crowd's oldest: %v", took, here(quiet), here(newcomer), here(crowd[0]))
	}
	if n, err := turnedAway.Read(make([]byte, 1)); err == nil {
		t.Errorf("one more of the crowd reads %d bytes", n)
	}
	if _, err := ends[quiet].Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the one that left can be read: %v", err)
	}
	if next := come("127.0.0.2"); here(crowd[0]) || !here(next) || !here(newcomer) {
		t.Error("the crowd did not get the place of its own oldest")
	}
	s.forget(ends[crowd[1]]) // ends
	s.forget(ends[crowd[1]])
	last := come("127.0.0.3")
	if !here(last) || !here(crowd[2]) || len(s.here) != 8 {
		t.Errorf("a place that was left was not given away: %v", s.here)
	}

	s.know(ends[crowd[2]]) // the core comes from there too
	begin = time.Now()
	come("127.0.0.4")
	fresh := come("127.0.0.2")
	for range 4 { // the rest of the crowd leaves for others
		come("127.0.0.2")
	}
	late := come("127.0.0.2")
	if took := time.Since(begin); took < strangerTime || here(fresh) || !here(late) {
		t.Errorf("after %v its oldest is here: %v, who waited: %v", took, here(fresh), here(late))
	}
}

// Connections that have shown the key need no place, and keep none.
func TestConnectionsWithTheKeyOutliveACrowd(t *testing.T) {
	t.Parallel()
	cert, key, trusted := selfSigned(t)
	for _, encrypted := range []bool{false, true} {
		d := startDaemon(t, newFakeEngine(t).host(), func(c *config) {
			c.strangers = 2
			if encrypted {
				c.tlsCert, c.tlsKey = cert, key
			}
		})
		address := strings.TrimPrefix(d.url, "http://")
		open := func() net.Conn {
			conn, err := net.Dial("tcp", address)
			if err == nil && encrypted {
				conn = tls.Client(conn, &tls.Config{RootCAs: trusted, ServerName: "127.0.0.1"})
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
			return conn
		}
		healthy := func(conn net.Conn) {
			t.Helper()
			io.WriteString(conn, "GET /health HTTP/1.1\r\nHost: h\r\nX-Duxcore-CoreKey: "+d.key+"\r\n\r\n")
			answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || answer.StatusCode != 204 {
				t.Fatalf("TLS %v: %v, %v", encrypted, answer, err)
			}
		}
		var core []net.Conn
		for range 5 {
			core = append(core, open())
			healthy(core[len(core)-1])
		}
		for range 10 { // each has a place, waits for one, or is turned away
			open()
		}
		for _, conn := range core {
			healthy(conn)
		}
		healthy(open())
		for _, conn := range core {
			healthy(conn)
		}
	}
}

// A crowd that holds all the places it can does not keep the core out, and a flood of requests
// without the key is a line a second in the log.
func TestCrowdWithoutTheKeyNeitherHoldsUpTheCoreNorFillsTheLog(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, newFakeEngine(t).host(), func(c *config) { c.strangers = 10 })
	d.do(t, "GET", "/health", "").want(t, 204) // the core is known to come from here, as behind a proxy
	for range 50 {
		conn := wireDial(t, d)
		io.WriteString(conn, "GET / HTTP/1.1\r\nHost: h\r\nX-") // and no more
	}
	fresh := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for range 3 {
		r := d.request(t, "GET", "/health", nil)
		a, err := fresh.Do(r)
		if err != nil || a.StatusCode != 204 {
			t.Fatalf("the core gets %v, %v", a, err)
		}
		a.Body.Close()
	}
	const refused = 300
	for range refused {
		if a, _ := sendRaw(t, d, "GET /service HTTP/1.1\r\nHost: h\r\n\r\n"); a.status != 401 {
			t.Fatalf("status %d", a.status)
		}
	}
	total, lines := 0, regexp.MustCompile(`msg=refused count=([0-9]+) last="127.0.0.1:`)
	waitFor(t, "all to be counted", func() bool {
		total = 0
		for _, line := range lines.FindAllStringSubmatch(d.log.String(), -1) {
			n, _ := strconv.Atoi(line[1])
			total += n
		}
		return total == refused
	})
	if n := strings.Count(d.log.String(), "\n"); n > refused/10 {
		t.Errorf("the log has %d lines", n)
	}
	if strings.Contains(d.log.String(), "status=401") {
		t.Error("a request without the key has a line of its own")
	}
}

// So do TLS handshakes that fail.
func TestFailedHandshakesAreCounted(t *testing.T) {
	t.Parallel()
	cert, key, _ := selfSigned(t)
	d := startDaemon(t, newFakeEngine(t).host(), func(c *config) { c.tlsCert, c.tlsKey = cert, key })
	for range 50 {
		conn, err := net.Dial("tcp", strings.TrimPrefix(d.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, "no TLS\r\n\r\n")
		io.Copy(io.Discard, conn)
		conn.Close()
	}
	waitFor(t, "the handshakes to be counted", func() bool { return strings.Contains(d.log.String(), "msg=refused count=") })
	names := slices.Repeat([]string{strings.Repeat("\x01", 250)}, 200) // the daemon's error quotes them
	if conn, err := tls.Dial("tcp", strings.TrimPrefix(d.url, "http://"), &tls.Config{InsecureSkipVerify: true, NextProtos: names}); err == nil {
		conn.Close()
		t.Error("the handshake has succeeded")
	}
	waitFor(t, "that one to be counted", func() bool { return strings.Contains(d.log.String(), "unsupported application protocols") })
	for line := range strings.Lines(d.log.String()) {
		if len(line) > 8*maxQuote {
			t.Errorf("the log has a line of %d bytes", len(line))
		}
	}
	if n := strings.Count(d.log.String(), "TLS handshake error"); n > 5 {
		t.Errorf("the log has %d lines of 50 handshakes", n)
	}
}
