package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// wholeTar returns a tar archive with one file.
func wholeTar() string {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	w.WriteHeader(&tar.Header{Name: "hello", Mode: 0o755, Size: 5})
	w.Write([]byte("world"))
	w.Close()
	return archive.String()
}

// startWithService starts a daemon that has the one service "web", stopped.
func startWithService(t testing.TB) (*fakeEngine, *daemon) {
	t.Helper()
	e := newFakeEngine(t)
	e.addImage("img:1")
	d := startDaemon(t, e.host(), nil)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	return e, d
}

// sendRaw sends text on a connection of its own and returns the answer, and whether
// the daemon closes the connection after it.
func sendRaw(t testing.TB, d *daemon, text string) (a answer, closed bool) {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(d.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	method, _, _ := strings.Cut(text, " ")
	reader := bufio.NewReader(conn)
	response, err := http.ReadResponse(reader, &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	if response.Close {
		_, err := reader.ReadByte()
		closed = err == io.EOF
	}
	return answer{response.StatusCode, response.Header, string(body)}, closed
}

// A service's whole life, in the order of the API page.
func TestServiceLivesAndDies(t *testing.T) {
	t.Parallel()
	for _, prefix := range []string{"", "/v1"} {
		e := newFakeEngine(t)
		e.addImage("img:1")
		d := startDaemon(t, e.host(), nil)
		d.do(t, "GET", prefix+"/health", "").want(t, 204)
		a := d.do(t, "POST", prefix+"/service", createBodyJSON("web", `"env":["A=1"]`)).want(t, 201)
		if got := a.header.Get("Location"); got != "/service/web" || a.body != "" {
			t.Errorf("Location %q, body %q", got, a.body)
		}
		d.do(t, "GET", prefix+"/service", "").want(t, 200, `"Names":["/web"]`)
		d.do(t, "GET", prefix+"/service/web", "").want(t, 200, `"Name":"/web"`)
		d.do(t, "GET", prefix+"/service/web/stats", "").want(t, 200, `"read":"0001`)
		for _, step := range []struct {
			op      string
			running bool
		}{{"kill", false}, {"stop", false}, {"start", true}, {"start", true}, {"restart", true},
			{"kill", false}, {"restart", true}, {"stop", false}, {"start", true}} {
			d.do(t, "POST", prefix+"/service/web/ctl", `{"op":"`+step.op+`"}`).want(t, 204)
			if c, _ := e.container("web"); c.Running != step.running {
				t.Fatalf("after %s: running is %v", step.op, c.Running)
			}
		}
		if a := d.do(t, "GET", prefix+"/service/web/stats", "").want(t, 200); strings.Contains(a.body, zeroTime) {
			t.Errorf("statistics of a running service without both samples: %s", a.body)
		}
		d.do(t, "PATCH", prefix+"/service/web/env", `{"B":"2"}`).want(t, 204)
		d.do(t, "POST", prefix+"/service/web/ctl", `{"op":"restart"}`).want(t, 204)
		if c, _ := e.container("web"); !slices.Equal(c.Config.Env, []string{"B=2"}) || !c.Running {
			t.Errorf("after PATCH and restart: env %q, running %v", c.Config.Env, c.Running)
		}
		d.do(t, "DELETE", prefix+"/service/web", "").want(t, 204)
		d.do(t, "DELETE", prefix+"/service/web", "").want(t, 404, `no service \"web\"`)
		a = d.do(t, "POST", prefix+"/docker/image", wholeTar()).want(t, 201, `{"image_id":"sha256:`)
		tag := "duxcore/import:" + a.body[len(`{"image_id":"sha256:`):][:12]
		if got := e.imageTags(); !slices.Equal(got, []string{tag, "img:1"}) {
			t.Errorf("images %q, want %q", got, tag)
		}
		if left := bindDirs(t, d.binds); len(left) > 0 || len(e.names()) > 0 {
			t.Errorf("left: %v %v", left, e.names())
		}
	}
}

func TestInspectPassesTheEnginesBytesOn(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	c, _ := e.container("web")
	const odd = `{ "Id":"%ID", "Name":"/web","State":{"Running":false},  "NewerField":1e2,` +
		`"Config":{"Labels":{"duxcore.service":"web","duxcore.binds":"%BINDS"}},` +
		`"Mounts":[{"Source":"%BINDS/web","NewerField":{}}]}`
	text := strings.NewReplacer("%ID", c.ID, "%BINDS", d.binds).Replace(odd)
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		io.WriteString(w, text)
		return true
	})
	if a := d.do(t, "GET", "/service/web", "").want(t, 200); a.body != text {
		t.Errorf("got  %s\nwant %s", a.body, text)
	}
}

func TestUnknownPathsAndMethods(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	before := len(e.calls())
	for _, test := range []struct {
		method, path string
		status       int
		allow        string
	}{
		{"GET", "/", 404, ""}, {"GET", "/v1", 404, ""}, {"GET", "/v2/service", 404, ""}, {"POST", "/nothing", 404, ""},
		{"GET", "/service/", 404, ""}, {"GET", "/service/web/", 404, ""}, {"GET", "/service/web/events", 404, ""},
		{"GET", "/v1/v1/service", 404, ""}, {"GET", "/Service", 404, ""}, {"GET", "/docker", 404, ""},
		{"GET", "//service", 404, ""}, {"GET", "/./service", 404, ""}, {"GET", "/v1/../service", 404, ""},
		{"GET", "/service/web/../web", 404, ""}, {"GET", "/containers/json", 404, ""}, {"GET", "/debug/pprof/", 404, ""},
		{"OPTIONS", "*", 404, ""}, {"CONNECT", "example.com:80", 404, ""}, {"GET", "/%2e%2e/service", 404, ""},
		{"DELETE", "/service", 405, "GET, POST"}, {"OPTIONS", "/v1/service", 405, "GET, POST"},
		{"PUT", "/service/web", 405, "DELETE, GET"}, {"POST", "/v1/service/web", 405, "DELETE, GET"},
		{"GET", "/service/web/ctl", 405, "POST"}, {"POST", "/service/web/stats", 405, "GET"},
		{"PUT", "/service/web/env", 405, "PATCH"}, {"GET", "/docker/image", 405, "POST"},
		{"POST", "/service/web/logs", 405, "GET"}, {"GET", "/service/web/stdin", 405, "POST"}, {"PUT", "/v1/service/web/tty", 405, "POST"},
		{"TRACE", "/health", 405, "GET"}, {"BREW", "/v1/health", 405, "GET"},
	} {
		a, _ := sendRaw(t, d, test.method+" "+test.path+" HTTP/1.1\r\nHost: h\r\nX-Duxcore-CoreKey: "+d.key+"\r\n\r\n")
		a.want(t, test.status)
		if got := a.header.Get("Allow"); got != test.allow {
			t.Errorf("%s %s: Allow is %q, want %q", test.method, test.path, got, test.allow)
		}
	}
	if after := e.calls()[before:]; len(after) > 0 {
		t.Errorf("the engine was asked %q", after)
	}
}

// Every route with a JSON body, against bodies that are no one good value.
// A field that is there twice would count as its last, and a null before it as nothing.
func TestFieldThatIsThereTwiceIsRefused(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	before := state(t, e, d)
	for _, test := range []struct{ method, path, body, field string }{
		{"PATCH", "/service/web/env", `{"A":null,"A":"x"}`, "A"},
		{"PATCH", "/service/web/env", `{"A":"x","\u0041":"y"}`, "A"},
		{"POST", "/service", createBodyJSON("new", `"max_ram":8000000,"max_ram":9000000`), "params.max_ram"},
		{"POST", "/service", strings.TrimSuffix(createBodyJSON("new", `"max_ram":8000000`), "}") + `,"params":{"max_ram":null},"params":{}}`, "params"},
		{"POST", "/service", createBodyJSON("new", `"port_map":{"80/tcp":[{"HostPort":"1","HostPort":"2"}]}`), "port_map: HostPort"},
	} {
		d.do(t, test.method, test.path, test.body).want(t, 400, test.field+": ")
	}
	deep := strings.Repeat(`{"`+strings.Repeat("n", 90)+`":`, 9_000) + "1" + strings.Repeat("}", 9_000)
	if used := allocatedBy(func() { d.do(t, "PATCH", "/service/web/env", deep).want(t, 400) }); used > 1<<30 { // other tests' too
		t.Errorf("a body of %d bytes allocated %d", len(deep), used)
	}
	d.do(t, "PATCH", "/service/web/env", `{"A":"x","a":"y"}`).want(t, 204)
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	if after := state(t, e, d); len(after) != len(before) {
		t.Errorf("left %s", after)
	}
}

func TestParameterThatIsNotThereIsRefused(t *testing.T) {
	t.Parallel()
	_, d := startWithService(t)
	for _, rt := range (&server{}).routes() {
		method, path, _ := strings.Cut(rt.pattern, " ")
		for _, query := range []string{"?strem=true", "?x", "?stream=true&stream=true", "?tail=1&tail=1", "?%zz", "?a;b"} {
			d.do(t, method, strings.ReplaceAll(path, "{id}", "web")+query, "").want(t, 400)
		}
	}
}

func TestJSONBodies(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	before := len(e.calls())
	good := map[string]string{
		"POST /service":          createBodyJSON("new", ""),
		"POST /service/web/ctl":  `{"op":"start"}`,
		"PATCH /service/web/env": `{"A":"1"}`,
	}
	for route, body := range good {
		method, path, _ := strings.Cut(route, " ")
		for _, test := range []struct {
			body   string
			status int
			text   string
		}{
			{"", 400, "empty"},
			{"  ", 400, "empty"},
			{"null", 400, ""},
			{"[]", 400, "body"},
			{`"x"`, 400, "body"},
			{"5", 400, "body"},
			{"{", 400, "malformed JSON"},
			{body[:len(body)-1], 400, "malformed JSON"},
			{body + "}", 400, "malformed JSON"},
			{body + body, 400, "more than one value"},
			{body + "\nnull", 400, "more than one value"},
			{body + "x", 400, "malformed JSON"},
			{"\ufeff" + body, 400, "malformed JSON"},
			{"\x1f\x8b" + body, 400, "malformed JSON"},
			{"<service/>", 400, "malformed JSON"},
			{strings.Replace(body, ":", "=", 1), 400, "malformed JSON"},
			{strings.Repeat("[", 20_000), 400, ""},
			{"{" + body[1:len(body)-1] + "," + body[1:], 400, "twice"},
			{strings.Repeat(" ", maxJSON) + body, 413, "1048576"},
			{body + strings.Repeat(" ", maxJSON-len(body)+1), 413, "1048576"},
		} {
			a := d.do(t, method, path, test.body)
			if a.want(t, test.status, test.text); strings.Contains(a.body, "Go ") || strings.Contains(a.body, "main.") {
				t.Errorf("an error in Go's terms: %s", a.body)
			}
		}
	}
	if after := e.calls()[before:]; len(after) > 0 {
		t.Errorf("the engine was asked %q", after)
	}
	for route, body := range good {
		method, path, _ := strings.Cut(route, " ")
		if a := d.do(t, method, path, body+strings.Repeat(" ", maxJSON-len(body))); a.status > 204 {
			t.Errorf("%s with as many bytes as allowed: %s", route, a.body)
		}
	}
}

func TestEngineFailuresReachTheClient(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		engineStatus int
		engineBody   string
		status       int
		text         string
	}{
		{400, `{"message":"bad parameter: x"}`, 400, "engine: bad parameter: x"},
		{404, `{"message":"No such thing"}`, 502, "No such thing"}, // the service exists: 404 would deny it
		{409, `{"message":"is in use"}`, 409, "engine: is in use"},
		{401, `{"message":"who are you"}`, 502, "who are you"},
		{403, `{"message":"not allowed"}`, 502, "not allowed"},
		{500, `{"message":"driver failed"}`, 502, "driver failed"},
		{501, `{"message":"not here"}`, 502, "not here"},
		{503, `{"message":"starting"}`, 502, "starting"},
		{500, `<html>`, 502, ""},
		{500, ``, 502, ""},
	} {
		e, d := startWithService(t)
		e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.URL.Path, "/start") {
				return false
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(test.engineStatus)
			io.WriteString(w, test.engineBody)
			return true
		})
		d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, test.status, test.text)
	}
}

// The engine answers 200 with something that is not what was asked for.
func TestGarbageFromTheEngineIsABadGateway(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	for _, garbage := range []string{"", "{", "<html>", `"x"`, `{"Id":5}`, "\x00", `[{"Id":`} {
		e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, garbage)
			return true
		})
		for _, call := range []string{"GET /service", "GET /service/web", "DELETE /service/web", "GET /service/web/stats"} {
			method, path, _ := strings.Cut(call, " ")
			if a := d.do(t, method, path, ""); a.status != 502 {
				t.Errorf("%s where the engine says %q: %d %s", call, garbage, a.status, a.body)
			}
		}
		for path, body := range map[string]string{"/service": createBodyJSON("new", ""), "/service/web/ctl": `{"op":"stop"}`} {
			if a := d.do(t, "POST", path, body); a.status != 502 {
				t.Errorf("POST %s where the engine says %q: %d %s", path, garbage, a.status, a.body)
			}
		}
	}
	e.setIntercept(nil)
	if got := e.names(); !slices.Equal(got, []string{"web"}) {
		t.Errorf("containers are %q", got)
	}
}

func TestEngineThatHangsIsAGatewayTimeout(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addImage("img:1")
	d := startDaemon(t, e.host(), func(c *config) { c.createTimeout = time.Second })
	for _, test := range []struct{ call, method, path, body string }{
		{"", "POST", "/service", createBodyJSON("web", "")}, // the first of all, a ping
		{"", "DELETE", "/service/web", ""},
		// Calls that nothing but the route's limit ends.
		{"/images/img:1/json", "POST", "/service", createBodyJSON("web", "")},
		{"/containers/create", "POST", "/service", createBodyJSON("web", "")},
	} {
		e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
			hangs := strings.HasSuffix(r.URL.Path, test.call)
			if hangs {
				<-r.Context().Done()
			}
			return hangs
		})
		d.do(t, test.method, test.path, test.body).want(t, 504)
		e.setIntercept(nil)
		d.do(t, "GET", "/service", "").want(t, 200, "[]")
	}
}

func TestDaemonStartsBeforeItsEngine(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addImage("img:1")
	e.close()
	d := startDaemon(t, e.host(), nil)
	d.do(t, "GET", "/health", "").want(t, 503)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 503)
	e.reopen()
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
}

func TestOneLogLineForEachRequest(t *testing.T) {
	t.Parallel()
	_, d := startWithService(t)
	before := len(d.log.String())
	tests := []struct {
		method, path, body string
		line               string
	}{
		{"GET", "/v1/service/web", "", `method=GET route="GET /v1/service/{id}" id=web status=200`},
		{"PATCH", "/service/web/env", `{"BODYMARK":"1"}`, `method=PATCH route="PATCH /service/{id}/env" id=web status=204`},
		{"DELETE", "/service/nobody", "", `method=DELETE route="DELETE /service/{id}" id=nobody status=404`},
		{"GET", "/service/a%0Amsg=request%20b", "", `route="GET /service/{id}" id="a\nmsg=request b" status=404`},
		{"POST", "/service", "BODYMARK", `method=POST route="POST /service" id="" status=400`},
		{"GET", "/elsewhere?QUERYMARK", "", `method=GET route=/ id="" status=404`},
		{"PUT", "/service", "BODYMARK", `method=PUT route=/service id="" status=405`},
	}
	for _, test := range tests {
		r := d.request(t, test.method, test.path, strings.NewReader(test.body))
		r.Header.Set("X-Registry-Auth", "HEADERMARK")
		d.send(t, r)
	}
	lines := func() []string { return strings.Split(strings.TrimSpace(d.log.String()[before:]), "\n") }
	waitFor(t, "a log line for each request", func() bool { return len(lines()) >= len(tests) && strings.Contains(d.log.String(), "status=405") })
	for i, line := range lines() {
		if i >= len(tests) || !strings.Contains(line, tests[i].line) || !strings.Contains(line, "msg=request") {
			t.Errorf("line %d is %s", i, line)
		}
	}
	for _, want := range []string{`bytes=\d+`, `duration=\S+s`, `remote=127\.0\.0\.1:\d+`} {
		if !regexp.MustCompile(want).MatchString(lines()[0]) {
			t.Errorf("%s is not in %s", want, lines()[0])
		}
	}
	for _, secret := range []string{"BODYMARK", "HEADERMARK", "QUERYMARK", d.key} {
		if strings.Contains(d.log.String(), secret) {
			t.Errorf("%s is in the log", secret)
		}
	}
}

// selfSigned writes a certificate for 127.0.0.1 and its key, and returns their paths and
// a pool that trusts it.
func selfSigned(t *testing.T) (cert, key string, trusted *x509.CertPool) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	trusted = x509.NewCertPool()
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	trusted.AddCert(parsed)
	return write("cert.pem", "CERTIFICATE", der), write("key.pem", "PRIVATE KEY", keyDER), trusted
}

func TestServesTLS(t *testing.T) {
	t.Parallel()
	cert, key, trusted := selfSigned(t)
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), func(c *config) { c.tlsCert, c.tlsKey = cert, key })
	plain := d.url
	d.url = strings.Replace(d.url, "http:", "https:", 1)
	transport := d.client.Transport.(*http.Transport)
	transport.ForceAttemptHTTP2 = true
	transport.TLSClientConfig = &tls.Config{RootCAs: trusted}
	response, err := d.client.Do(d.request(t, "GET", "/health", nil))
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != 204 || response.Proto != "HTTP/1.1" {
		t.Errorf("%s in %s", response.Status, response.Proto)
	}
	conn, err := tls.Dial("tcp", strings.TrimPrefix(plain, "http://"), &tls.Config{RootCAs: trusted, MaxVersion: tls.VersionTLS11})
	if err == nil {
		conn.Close()
		t.Error("the daemon speaks TLS 1.1")
	}
	d.url = plain
	if a := d.do(t, "GET", "/health", ""); a.status != 400 {
		t.Errorf("plain HTTP to the TLS port: %d", a.status)
	}
}

func TestBrokenCertificateStopsTheDaemon(t *testing.T) {
	t.Parallel()
	cert, _, _ := selfSigned(t)
	_, otherKey, _ := selfSigned(t)
	for _, key := range []string{otherKey, cert, filepath.Join(t.TempDir(), "missing")} {
		_, err := startError(t, func(c *config) { c.tlsCert, c.tlsKey = cert, key })
		if err == nil {
			t.Errorf("runs with the key %s", key)
		}
	}
}

func TestSecondDaemonOnTheSameBindsRefusesToStart(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, newFakeEngine(t).host(), nil)
	_, err := startError(t, func(c *config) { c.binds = d.binds })
	if err == nil || !strings.Contains(err.Error(), "in use by another daemon") {
		t.Errorf("the second daemon ended with %v", err)
	}
}
