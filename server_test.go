package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"
)

// A service's whole life, in the order of the API page.
func TestServiceLivesAndDies(t *testing.T) {
	t.Parallel()
	for _, prefix := range []string{"", "/v1"} {
		e, d := start(t, nil)
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
		wantNothing(t, d, e)
		d.do(t, "DELETE", prefix+"/service/web", "").want(t, 404, `no service \"web\"`)
		a = d.do(t, "POST", prefix+"/docker/image", wholeTar()).want(t, 201, `{"image_id":"sha256:`)
		tag := "duxcore/import:" + a.body[len(`{"image_id":"sha256:`):][:12]
		if got := e.imageTags(); !slices.Equal(got, []string{tag, "img:1"}) {
			t.Errorf("images %q, want %q", got, tag)
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
		{"GET", "/", 404, ""}, {"GET", "/v1", 404, ""}, {"GET", "/v2/service", 404, ""},
		{"POST", "/nothing", 404, ""}, {"GET", "/service/", 404, ""}, {"GET", "/service/web/", 404, ""},
		{"GET", "/service/web/events", 404, ""}, {"GET", "/v1/v1/service", 404, ""}, {"GET", "/Service", 404, ""},
		{"GET", "/docker", 404, ""}, {"GET", "//service", 404, ""}, {"GET", "/./service", 404, ""},
		{"GET", "/v1/../service", 404, ""}, {"GET", "/service/web/../web", 404, ""},
		{"GET", "/containers/json", 404, ""}, {"GET", "/debug/pprof/", 404, ""}, {"OPTIONS", "*", 404, ""},
		{"CONNECT", "example.com:80", 404, ""}, {"GET", "/%2e%2e/service", 404, ""},
		{"DELETE", "/service", 405, "GET, POST"}, {"OPTIONS", "/v1/service", 405, "GET, POST"},
		{"PATCH", "/service/web", 405, "DELETE, GET, PUT"}, {"POST", "/v1/service/web", 405, "DELETE, GET, PUT"},
		{"GET", "/service/web/ctl", 405, "POST"}, {"POST", "/service/web/stats", 405, "GET"},
		{"PUT", "/service/web/env", 405, "PATCH"}, {"PUT", "/docker/image", 405, "GET, POST"},
		{"GET", "/docker/image/sha256:1", 405, "DELETE"}, {"POST", "/service/web/logs", 405, "GET"},
		{"GET", "/service/web/stdin", 405, "POST"}, {"PUT", "/v1/service/web/tty", 405, "POST"},
		{"TRACE", "/health", 405, "GET"}, {"BREW", "/v1/health", 405, "GET"},
	} {
		a, _ := sendRaw(t, d, d.head(test.method+" "+test.path)+"\r\n")
		a.want(t, test.status)
		if got := a.header.Get("Allow"); got != test.allow {
			t.Errorf("%s %s: Allow is %q, want %q", test.method, test.path, got, test.allow)
		}
	}
	e.wantAskedNothing(t, before)
}

// encoding/json decodes a null as if the field were absent, and replaces what is not UTF-8.
func TestBodiesThatDecodeToSomethingElseAreRefused(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	before := state(t, e, d)
	for _, test := range []struct{ method, path, body, text string }{
		{"PATCH", "/service/web/env", `{"A":null}`, "A: a JSON null"},
		{"POST", "/service", createBodyJSON("new", `"cmd":["a",null]`), "params.cmd: a JSON null"},
		{"PATCH", "/service/web/env", "{\"A\":\"p\xe4ss\"}", "UTF-8"},
		{"POST", "/service", createBodyJSON("new", "\"cmd\":[\"\xff\"]"), "UTF-8"},
	} {
		d.do(t, test.method, test.path, test.body).want(t, 400, test.text)
	}
	deep := strings.Repeat(`{"n":`, 9_000) + "1" + strings.Repeat("}", 9_000)
	// other tests' too
	if used := allocatedBy(func() { d.do(t, "PATCH", "/service/web/env", deep).want(t, 400) }); used > 1<<30 {
		t.Errorf("a body of %d bytes allocated %d", len(deep), used)
	}
	d.do(t, "PATCH", "/service/web/env", `{"A":"x","a":"y"}`).want(t, 204)
	wantState(t, e, d, before)
}

func TestParameterThatIsNotThereIsRefused(t *testing.T) {
	t.Parallel()
	_, d := startWithService(t)
	for _, rt := range (&server{}).routes() {
		method, path, _ := strings.Cut(rt.pattern, " ")
		for _, query := range []string{"?strem=true", "?x", "?stream=true&stream=true", "?tail=1&tail=1", "?%zz",
			"?a;b"} {
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
			{`{"more":1,` + body[1:], 400, "more"},
			{strings.Repeat(" ", maxJSON) + body, 413, "65536"},
			{body + strings.Repeat(" ", maxJSON-len(body)+1), 413, "65536"},
		} {
			d.do(t, method, path, test.body).want(t, test.status, test.text)
		}
	}
	e.wantAskedNothing(t, before)
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
		{400, `{"message":"bad parameter: x"}`, 502, "engine: bad parameter: x"}, // a start has no parameter
		{400, `{"message":"failed to create shim task: exec: \"/nope\": stat /nope: no such file"}`, 400, "/nope"},
		{400, `{"message":"invalid mount config: bind source path does not exist"}`, 502, "bind source"},
		// the service exists: 404 would deny it
		{404, `{"message":"No such thing"}`, 502, "No such thing"},
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
		e.answerWith("/start", test.engineStatus, test.engineBody)
		d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, test.status, test.text)
		if starts := countCalls(e.calls(), "/start"); starts != 1 {
			t.Errorf("%s: it was tried %d times", test.engineBody, starts)
		}
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
		for _, call := range []string{"GET /service", "GET /service/web", "DELETE /service/web",
			"GET /service/web/stats"} {
			method, path, _ := strings.Cut(call, " ")
			if a := d.do(t, method, path, ""); a.status != 502 {
				t.Errorf("%s where the engine says %q: %d %s", call, garbage, a.status, a.body)
			}
		}
		for path, body := range map[string]string{"/service": createBodyJSON("new", ""),
			"/service/web/ctl": `{"op":"stop"}`} {
			if a := d.do(t, "POST", path, body); a.status != 502 {
				t.Errorf("POST %s where the engine says %q: %d %s", path, garbage, a.status, a.body)
			}
		}
	}
	e.setIntercept(nil)
	e.wantNames(t, "web")
}

func TestEngineThatHangsIsAGatewayTimeout(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ call, method, path, body string }{
		{"", "POST", "/service", createBodyJSON("web", "")}, // the first of all, a ping
		{"", "DELETE", "/service/web", ""},
		// Calls that nothing but the route's limit ends.
		{"/images/img:1/json", "POST", "/service", createBodyJSON("web", "")},
		{"/containers/create", "POST", "/service", createBodyJSON("web", "")},
		{"/other/json", "GET", "/service/other/logs", ""},
		{"/other/json", "GET", "/service/other/logs?follow=true", ""},
		{"/other/json", "POST", "/service/other/stdin", ""},
		{"/other/json", "POST", "/service/other/tty", `{"rows":1,"cols":1}`},
	} {
		t.Run(test.call+" "+test.path, func(t *testing.T) {
			t.Parallel()
			e, d := start(t, func(c *config) { c.createTimeout, c.timeouts.engineRead = haste(), haste() })
			d.do(t, "POST", "/service", createBodyJSON("other", "")).want(t, 201)
			e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
				hangs := strings.HasSuffix(r.URL.Path, test.call)
				if hangs {
					<-r.Context().Done()
				}
				return hangs
			})
			d.do(t, test.method, test.path, test.body).want(t, 504)
			e.setIntercept(nil)
			d.do(t, "GET", "/service", "").want(t, 200)
			e.wantNames(t, "other")
		})
	}
}

// An upload is not a JSON body, whatever the limit on its size.
func TestUploadWithTheLimitOfJSON(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), func(c *config) { c.maxImageBytes = maxJSON })
	d.do(t, "POST", "/docker/image", wholeTar()).want(t, 201)
}

// The log is the audit trail: it names what was changed, and no client makes its lines long.
func TestLogNamesWhatIsChanged(t *testing.T) {
	t.Parallel()
	_, d := startWithService(t)
	id := strings.Split(d.do(t, "POST", "/docker/image", wholeTar()).want(t, 201).body, `"`)[3]
	d.do(t, "DELETE", "/docker/image/"+id, "").want(t, 204)
	d.do(t, "POST", "/service/web/ctl", `{"op":"`+strings.Repeat("x", 60_000)+`"}`).want(t, 400)
	d.do(t, "GET", "/service/"+strings.Repeat("y", 9_000), "").want(t, 404)
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	must(t, d.stop())
	log := d.log.String()
	for _, want := range []string{"id=" + id + " status=201", "id=" + id + " status=204", "op=import_image",
		"op=remove_image", "op=delete"} {
		if !strings.Contains(log, want) {
			t.Errorf("%s is not in the log", want)
		}
	}
	for line := range strings.Lines(log) {
		if len(line) > 2000 {
			t.Errorf("a line of %d bytes: %.100s", len(line), line)
		}
	}
}

func TestHTTP10IsRefused(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	before := len(e.calls())
	for _, request := range []string{"GET /service", "DELETE /service/web", "GET /nothing"} {
		a, _ := sendRaw(t, d, request+" HTTP/1.0\r\nHost: h\r\nX-Duxcore-CoreKey: "+d.key+"\r\n\r\n")
		a.want(t, 505, "http_version_not_supported")
		a, _ = sendRaw(t, d, request+" HTTP/1.0\r\nHost: h\r\n\r\n")
		if a.want(t, 401); a.header.Get("Server") != "" {
			t.Error("without the key the answer names the program")
		}
	}
	e.wantAskedNothing(t, before)
	if got := d.do(t, "GET", "/nothing", "").want(t, 404).header.Get("Server"); !strings.HasPrefix(got,
		"duxcore-daemon/") {
		t.Errorf("Server: %q", got)
	}
}

func TestMachineSaysWhatACoreNeedsToPlaceAService(t *testing.T) {
	t.Parallel()
	// Not in memory, if there is another file system: of some, root alone may use the last blocks.
	d := startDaemon(t, newFakeEngine(t).host(), func(c *config) {
		c.binds = filepath.Join(t.TempDir(), "binds")
	})
	var machine struct {
		Version, Engine, API, Arch string
		CPUs, Memory               int64
		BindRoot                   struct {
			Size, Free, Inodes uint64
			FreeInodes         uint64 `json:"free_inodes"`
		} `json:"bind_root"`
	}
	var disk syscall.Statfs_t
	must(t, syscall.Statfs(d.binds, &disk))
	body := d.do(t, "GET", "/machine", "").want(t, 200, `"free_inodes":`, `"api":`).body
	if err := json.Unmarshal([]byte(body), &machine); err != nil || machine.Version == "" || machine.CPUs != 8 ||
		machine.Memory != 33645404160 ||
		machine.Engine != "1" || machine.Arch != "x86_64" ||
		machine.BindRoot.Size != disk.Blocks*uint64(disk.Frsize) ||
		machine.BindRoot.Free == 0 || machine.BindRoot.Free > disk.Bavail*uint64(disk.Frsize)+1<<30 ||
		machine.BindRoot.Inodes != disk.Files || machine.BindRoot.FreeInodes >= disk.Files {
		t.Errorf("%s: %+v, %v", body, machine, err)
	}
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
		{"PATCH", "/service/web/env", `{"BODYMARK":"1"}`,
			`method=PATCH route="PATCH /service/{id}/env" id=web status=204`},
		{"POST", "/service/web/ctl", `{"op":"stop"}`,
			`level=INFO msg=request method=POST route="POST /service/{id}/ctl" id=web status=204`},
		{"POST", "/service/web/ctl", `{"op":"kill"}`, `op=kill request_id=1.a-B`},
		{"POST", "/service", createBodyJSON("new", `"image":"none:1"`), `route="POST /service" id=new status=404`},
		{"POST", "/service", createBodyJSON("web", ""), `op=create`},
		{"PUT", "/service/web", "BODYMARK", `op=put`},
		{"PATCH", "/service/web/env", "BODYMARK", `op=env`},
		{"POST", "/docker/image", "BODYMARK", `op=import_image`},
		{"DELETE", "/docker/image/sha256:1", "", `op=remove_image`},
		{"GET", "/health", "", `level=DEBUG msg=request method=GET route="GET /health" id="" status=204`},
		{"DELETE", "/service/nobody", "", `method=DELETE route="DELETE /service/{id}" id=nobody status=404`},
		{"GET", "/service/a%0Amsg=request%20b", "", `route="GET /service/{id}" id="a\nmsg=request b" status=404`},
		{"POST", "/service", "BODYMARK", `method=POST route="POST /service" id="" status=400`},
		{"GET", "/elsewhere?QUERYMARK", "", `method=GET route=/ id="" status=404`},
		{"PUT", "/service", "BODYMARK", `method=PUT route=/service id="" status=405`},
	}
	for _, test := range tests {
		r := d.request(t, test.method, test.path, strings.NewReader(test.body))
		r.Header.Set("X-Registry-Auth", "HEADERMARK")
		r.Header.Set("X-Request-Id", "1.a-B")
		if test.path == "/health" {
			r.Header.Set("X-Request-Id", "HEADERMARK x=1")
		}
		d.send(t, r)
	}
	lines := func() []string { return strings.Split(strings.TrimSpace(d.log.String()[before:]), "\n") }
	waitFor(t, "a log line for each request", func() bool {
		return len(lines()) >= len(tests) && strings.Contains(d.log.String(), "status=405")
	})
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
	must(t, err)
	response.Body.Close()
	if response.StatusCode != 204 || response.Proto != "HTTP/1.1" {
		t.Errorf("%s in %s", response.Status, response.Proto)
	}
	conn, err := tls.Dial("tcp", strings.TrimPrefix(plain, "http://"),
		&tls.Config{RootCAs: trusted, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11})
	if err == nil {
		conn.Close()
		t.Error("the daemon speaks TLS 1.1")
	}
	d.url = plain
	if a := d.do(t, "GET", "/health", ""); a.status != 400 {
		t.Errorf("plain HTTP to the TLS port: %d", a.status)
	}
}

func TestSecondDaemonOnTheSameBindsRefusesToStart(t *testing.T) {
	t.Parallel()
	_, d := start(t, nil)
	_, err := startError(t, func(c *config) { c.binds = d.binds })
	if err == nil || !strings.Contains(err.Error(), "in use by another daemon") {
		t.Errorf("the second daemon ended with %v", err)
	}
}

func TestConnectionThatWasIdleForLongIsAskedToContinue(t *testing.T) {
	t.Parallel()
	_, d := start(t, func(c *config) { c.timeouts.clientWrite = haste() / 4 })
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	c := wireDial(t, d)
	answers := bufio.NewReader(c)
	io.WriteString(c, d.head("GET /health")+"\r\n")
	first, err := http.ReadResponse(answers, nil)
	if err != nil || first.StatusCode != http.StatusNoContent {
		t.Fatalf("%v %v", first, err)
	}
	// Longer than the daemon would wait for its answer to be taken: the quiet itself is the condition.
	c.SetReadDeadline(time.Now().Add(haste() / 2))
	if text, err := answers.Peek(1); err == nil {
		t.Fatalf("the daemon says %q", text)
	}
	c.SetReadDeadline(time.Now().Add(patience))
	io.WriteString(c, d.head("PATCH /service/web/env")+"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
	line, err := answers.ReadString('\n')
	if err != nil || !strings.Contains(line, "100 Continue") {
		t.Errorf("the daemon answers %q, %v", line, err)
	}
}

// What each error of every test must not tell, send looks for.
func TestErrorsTellNothingOfTheInside(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	without, _ := sendRaw(t, d, "GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	errorsClean(t, d, without.body)

	// Our own fault.
	marks := filepath.Join(d.binds, markDir)
	must(t, os.Rename(marks, marks+"-away"))
	d.do(t, "POST", "/service", createBodyJSON("new", "")).want(t, 500)
	must(t, os.Rename(marks+"-away", marks))

	// What the engine says is passed on, for operators: as it is, but no more than they read.
	for message, passed := range map[string]string{
		`invalid mount config: ` + d.binds:                              `invalid mount config: ` + d.binds,
		`open /var/lib/docker/overlay2/x/merged/y: input/output error`:  `overlay2/x/merged/y: input/output error`,
		`denied: <html>` + strings.Repeat("é", 4000) + "the end":        "denied: <html>é",
		strings.Repeat("\x20", 512-len("engine: ")-1) + "é, much later": "engine: ",
	} {
		for engines, ours := range map[int]int{200: 502, 400: 400, 404: 502, 500: 502} {
			e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, "/stop") && !strings.HasSuffix(r.URL.Path, "/images/create") {
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
				answers = append(answers, d.do(t, "POST", "/service/web/ctl", `{"op":"stop"}`))
			}
			for _, a := range answers {
				a.want(t, ours, "engine: ")
				if n := len(description(t, a)); n > 512+len("…") || !utf8.ValidString(a.body) ||
					!strings.Contains(description(t, a), passed) {
					t.Errorf("%d bytes: %s", n, a.body)
				}
			}
		}
	}
	e.setIntercept(nil)

	// So is what the client sent, as far as it is quoted.
	long := strings.Repeat("\x01", 10_000)
	quoted, _ := json.Marshal(long)
	for _, r := range []struct{ method, path, body string }{
		{"PATCH", "/service/web/env", `{` + string(quoted) + `:1}`},
		{"POST", "/service", `{` + string(quoted) + `:1}`},
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
	must(t, err)
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
	_, d := start(t, func(c *config) { c.fetchAllow = networks("127.0.0.0/8") })
	contents := fmt.Sprintf(`"bind_contents":"http://%s/"`, listener.Addr())
	got := description(t, d.do(t, "POST", "/service", createBodyJSON("web", contents)).want(t, 502))
	if want := "bind_contents: cannot download: connection reset by peer"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	for name, test := range map[string]struct {
		err  net.DNSError
		want string
	}{
		"no such name": {net.DNSError{Err: "no such host", Name: "n", Server: "10.0.0.1:53", IsNotFound: true},
			"no such host"},
		"no server": {net.DNSError{Err: "dial udp 10.0.0.1:53: connect: connection refused",
			Server: "10.0.0.1:53"}, "the host's name cannot be looked up"},
		"a silent one": {net.DNSError{Err: "read udp 10.0.0.2:3->10.0.0.1:53: i/o timeout", IsTimeout: true},
			"the host's name cannot be looked up"},
		"given up": {net.DNSError{Err: "operation was canceled", UnwrapErr: context.Canceled},
			"the host's name cannot be looked up"},
	} {
		err := fetchError(t.Context(), &url.Error{Op: "Get", URL: "http://n/TOKEN",
			Err: &net.OpError{Op: "dial", Err: &test.err}})
		if got := err.Error(); got != "bind_contents: cannot download: "+test.want {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// CVE-2025-69199: a client that takes its time is sent away.
func TestSlowClientsAreDropped(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), func(c *config) { c.timeouts.jsonBody = 200 * time.Millisecond })
	for name, test := range map[string]struct {
		begin string
		drip  string
		want  string // the answer begins with it
	}{
		"nothing":       {"", "", ""},
		"half a header": {"GET /health HTTP/1.1\r\nHost: h\r\nX-A: ", "", ""},
		"slow header":   {"GET /health HTTP/1.1\r\nHost: h\r\nX-A: ", "a", ""},
		"no body":       {d.head("POST /service") + "Content-Length: 100\r\n\r\n", "", "HTTP/1.1 400 "},
		"slow body":     {d.head("POST /service") + "Content-Length: 10000\r\n\r\n", " ", "HTTP/1.1 400 "},
		"slow chunks": {d.head("PATCH /service/web/env") + "Transfer-Encoding: chunked\r\n\r\n",
			"1\r\n \r\n", "HTTP/1.1 400 "},
		"unwanted body":  {d.head("GET /nowhere") + "Content-Length: 100\r\n\r\n", "", "HTTP/1.1 404 "},
		"slow, unwanted": {d.head("DELETE /health") + "Content-Length: 100000\r\n\r\n", " ", "HTTP/1.1 405 "},
		"slow, no key": {"POST /docker/image HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n", " ",
			"HTTP/1.1 401 "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := wireDial(t, d)
			closed := make(chan struct{})
			var dripping sync.WaitGroup
			dripping.Go(func() {
				io.WriteString(conn, test.begin)
				for every := time.Tick(50 * time.Millisecond); test.drip != ""; {
					select {
					case <-every:
						io.WriteString(conn, test.drip)
					case <-closed:
						return
					}
				}
			})
			answer, err := io.ReadAll(conn)
			close(closed)
			dripping.Wait()
			if timeout, ok := err.(net.Error); ok && timeout.Timeout() ||
				!strings.HasPrefix(string(answer), test.want) {
				t.Errorf("got %q, %v", answer, err)
			}
		})
	}
}

func TestHeadersAreBounded(t *testing.T) {
	t.Parallel()
	_, d := start(t, nil)
	for _, test := range []struct {
		line, header string
		status       int
	}{
		{"GET /health HTTP/1.1", "X-A: " + strings.Repeat("a", 11<<10), 204},
		{"GET /health HTTP/1.1", "X-A: " + strings.Repeat("a", 16<<10), 431},
		{"GET /health HTTP/1.1", strings.TrimSuffix(strings.Repeat("X-A: aaaaaaaaa\r\n", 1<<10), "\r\n"), 431},
		{"GET /health HTTP/1.1", "X-A: a\r\n " + strings.Repeat("a\r\n ", 4<<10) + "b", 431},
		{"GET /" + strings.Repeat("a", 16<<10) + " HTTP/1.1", "X-A: a", 431},
		{"GET /health HTTP/1.1", strings.Repeat("a", 16<<10) + ": a", 431},
	} {
		a, closed := sendRaw(t, d,
			test.line+"\r\nHost: h\r\nX-Duxcore-CoreKey: "+d.key+"\r\n"+test.header+"\r\n\r\n")
		if a.status != test.status || closed != (test.status == 431) {
			t.Errorf("%.30q with %d bytes of header: status %d, closed %v", test.line, len(test.header), a.status,
				closed)
		}
	}
}

func TestBodyWithoutEndIsCutOff(t *testing.T) {
	t.Parallel()
	_, d := start(t, func(c *config) { c.maxImageBytes = 4 << 20 })
	const chunked = "Transfer-Encoding: chunked\r\n"
	for _, test := range []struct {
		line, framing string
		status        int
	}{
		{"POST /service", chunked, 413},
		{"POST /service", "Content-Length: 1099511627776\r\n", 413},
		{"POST /service/web/ctl", chunked, 413},
		{"PATCH /service/web/env", "Content-Length: 1099511627776\r\n", 413},
		{"GET /nowhere", chunked, 404},
		{"GET /nowhere", "Content-Length: 1099511627776\r\n", 404},
		{"PUT /service", "Content-Length: 1099511627776\r\n", 405},
		{"GET /health", chunked, 413},
		{"DELETE /service/web", "Content-Length: 1099511627776\r\n", 413},
	} {
		t.Run(test.line+" "+test.framing, func(t *testing.T) {
			t.Parallel()
			conn := wireDial(t, d)
			io.WriteString(conn, d.head(test.line)+test.framing+"\r\n")
			piece := strings.Repeat(" ", 32<<10)
			if test.framing == chunked {
				piece = fmt.Sprintf("%x\r\n%s\r\n", len(piece), piece)
			}
			var sent error
			var sending sync.WaitGroup
			sending.Go(func() {
				// at full speed it would show no more
				for every := time.Tick(10 * time.Millisecond); sent == nil; <-every {
					_, sent = io.WriteString(conn, piece)
				}
			})
			if status := wireStatus(t, conn); status != test.status {
				t.Errorf("%s: status %d, want %d", test.line, status, test.status)
			}
			sending.Wait()
			if errors.Is(sent, os.ErrDeadlineExceeded) { // which wireDial has set
				t.Errorf("%s with %q: the daemon takes all", test.line, test.framing)
			}
		})
	}
}

// Shapes that a proxy in front may take for another number of requests. What matters is
// that the last line, which is a request of its own for some, is never answered.
func TestSmugglingShapes(t *testing.T) {
	t.Parallel()
	_, d := start(t, nil)
	head, smuggled := d.head("POST /nowhere"), d.head("GET /health")+"\r\n"
	for name, test := range map[string]struct {
		text     string
		statuses []int // until the daemon closes the connection
	}{
		"two lengths":                   {head + "Content-Length: 0\r\nContent-Length: 44\r\n\r\n", []int{400}},
		"two lengths, the first larger": {head + "Content-Length: 44\r\nContent-Length: 0\r\n\r\n", []int{400}},
		"a list of lengths":             {head + "Content-Length: 0, 44\r\n\r\n", []int{400}},
		"a list of equal lengths":       {head + "Content-Length: 0, 0\r\n\r\n", []int{400}},
		"signed length":                 {head + "Content-Length: +0\r\n\r\n", []int{400}},
		"negative length":               {head + "Content-Length: -1\r\n\r\n", []int{400}},
		"hexadecimal length":            {head + "Content-Length: 0x0\r\n\r\n", []int{400}},
		"empty length":                  {head + "Content-Length:\r\n\r\n", []int{400}},
		"huge length":                   {head + "Content-Length: 99999999999999999999\r\n\r\n", []int{400}},
		"length and chunked": {head +
			"Content-Length: 44\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", []int{404}},
		"chunked and length": {head +
			"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n0\r\n\r\n", []int{404}},
		"bad length and chunked": {head +
			"Content-Length: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", []int{400}},
		"chunked twice": {head +
			"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", []int{501}},
		"chunked in a list": {head + "Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n",
			[]int{501}},
		"chunked folded": {head + "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", []int{404}},
		"chunked, folded and more": {head + "Transfer-Encoding: chunked\r\n , identity\r\n\r\n0\r\n\r\n",
			[]int{501}},
		"xchunked":                    {head + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", []int{501}},
		"chunked with a vertical tab": {head + "Transfer-Encoding: \vchunked\r\n\r\n0\r\n\r\n", []int{400}},
		"chunked with a NUL":          {head + "Transfer-Encoding: chunked\x00\r\n\r\n0\r\n\r\n", []int{400}},
		"identity":                    {head + "Transfer-Encoding: identity\r\n\r\n", []int{501}},
		"a space before the colon":    {head + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", []int{400}},
		"a space before the name": {"POST /nowhere HTTP/1.1\r\n X: y\r\n" +
			head[len("POST /nowhere HTTP/1.1\r\n"):] + "\r\n", []int{400}},
		"a bare CR in a value":     {head + "X: a\rTransfer-Encoding: chunked\r\n\r\n", []int{400}},
		"a bare CR in a name":      {head + "X\rY: a\r\n\r\n", []int{400}},
		"a chunk size with a sign": {head + "Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n", []int{404}},
		"a chunk size that overflows": {head + "Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n\r\n",
			[]int{404}},
		"a chunk with a bare LF": {head + "Transfer-Encoding: chunked\r\n\r\n0\n\r\n", []int{404}},
		"a chunk extension with an LF": {head + "Transfer-Encoding: chunked\r\n\r\n2;\nxx\r\n0\r\n\r\n",
			[]int{404}},
		"a length in the trailer": {head +
			"Transfer-Encoding: chunked\r\nTrailer: Content-Length\r\n\r\n0\r\nContent-Length: 5\r\n\r\n", []int{400}},
		"chunked in HTTP/1.0": {strings.Replace(head, "1.1", "1.0", 1) +
			"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", []int{505}},
		"length and chunked in HTTP/1.0": {strings.Replace(head, "1.1", "1.0", 1) +
			"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", []int{505}},
		"two hosts": {head + "Host: other\r\n\r\n", []int{400}},
		"no host":   {strings.Replace(head, "Host: h\r\n", "", 1) + "\r\n", []int{400}},
		"HTTP/2":    {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", []int{401}},
		"an upgrade to HTTP/2": {head +
			"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
			[]int{404}},
	} {
		t.Run(name, func(t *testing.T) {
			conn := wireDial(t, d)
			io.WriteString(conn, test.text+smuggled)
			if got := wireStatuses(t, conn); fmt.Sprint(got) != fmt.Sprint(test.statuses) {
				t.Errorf("statuses %v, want %v", got, test.statuses)
			}
		})
	}
	// What is unusual but means one thing to all works on.
	for name, framing := range map[string]string{
		"two equal lengths": "Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
		"lines with LF":     "Content-Length: 2\n\n{}",
		"a folded value":    "X: a\r\n b\r\nContent-Length: 2\r\n\r\n{}",
	} {
		conn := wireDial(t, d)
		io.WriteString(conn, head+framing+smuggled+head+"Connection: close\r\n\r\n")
		if got := fmt.Sprint(wireStatuses(t, conn)); got != "[404 204 404]" {
			t.Errorf("%s: statuses %s", name, got)
		}
	}
}
