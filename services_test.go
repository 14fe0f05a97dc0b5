package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// state is what a request may have changed: containers, images and bind directories.
func state(t testing.TB, e *fakeEngine, d *daemon) string {
	t.Helper()
	var all strings.Builder
	for _, name := range bindDirs(t, d.binds) {
		all.WriteString(" dir:" + name)
	}
	for _, name := range e.names() {
		c, _ := e.container(name)
		all.WriteString(" container:" + name + ":" + c.ID)
		if c.Running {
			all.WriteString(":running")
		}
	}
	return all.String() + " images:" + strings.Join(e.imageTags(), ",")
}

// wantState fails the test if something has changed.
func wantState(t testing.TB, e *fakeEngine, d *daemon, before string) {
	t.Helper()
	if after := state(t, e, d); after != before {
		t.Errorf("before%s\nafter%s", before, after)
	}
}

// Somebody takes the name while the create is under way: its commit fails.
func TestNameThatIsTakenDuringACreate(t *testing.T) {
	t.Parallel()
	e, d := start(t, nil)
	e.setIntercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/containers/create") {
			e.addForeign("web", nil)
		}
		return false
	})
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 409, `"id_taken"`)
	if left := bindDirs(t, d.binds); len(left) > 0 || !slices.Equal(e.names(), []string{"web"}) {
		t.Errorf("left %q and %q", left, e.names())
	}
}

// The list's entries are the engine's, with what this program's library does not know.
func TestListIsAsTheEngineWroteIt(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	const tomorrow = `"Tomorrow": {"ratio": 1.50, "text": "<&>"}`
	var all string
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path[len("/v1.41"):] != "/containers/json" {
			return false
		}
		recorded := httptest.NewRecorder()
		e.list(recorded, r)
		all = strings.Replace(strings.TrimSpace(recorded.Body.String()), "[{", "[ {"+tomorrow+", ", 1)
		io.WriteString(w, all)
		return true
	})
	a := d.do(t, "GET", "/service", "").want(t, 200, tomorrow)
	if want := strings.Replace(all, "[ {", "[{", 1) + "\n"; a.body != want {
		t.Errorf("got  %s\nwant %s", a.body, want)
	}
	for _, broken := range []string{strings.TrimSuffix(all, "]"), "{}", "null", ""} {
		e.answerWith("/containers/json", 200, broken)
		d.do(t, "GET", "/service", "").want(t, 502, "cannot be read")
	}
	e.setIntercept(nil)
	d.do(t, "POST", "/service", createBodyJSON("other", "")).want(t, 201)
	var list []struct{ Names []string }
	if err := json.Unmarshal([]byte(d.do(t, "GET", "/service", "").body), &list); err != nil || len(list) != 2 ||
		list[0].Names[0] != "/other" {
		t.Errorf("%v %v", list, err)
	}
}

// A service does not start while its port on the host is somebody else's, and loses nothing by it.
func TestHostPortThatIsTaken(t *testing.T) {
	t.Parallel()
	e, d := start(t, nil)
	publish := `"port_map":{"80/tcp":{"HostPort":"8080"}}`
	d.do(t, "POST", "/service", createBodyJSON("first", publish)).want(t, 201)
	d.do(t, "POST", "/service", createBodyJSON("second", publish)).want(t, 201)
	d.do(t, "POST", "/service/first/ctl", `{"op":"start"}`).want(t, 204)
	before := state(t, e, d)
	d.do(t, "POST", "/service/second/ctl", `{"op":"start"}`).want(t, 409, "port_taken", "0.0.0.0:8080",
		"address already in use")
	if after := state(t, e, d); after != before {
		t.Errorf("left %s, before it was %s", after, before)
	}
	d.do(t, "POST", "/service/first/ctl", `{"op":"stop"}`).want(t, 204)
	e.takePort("8080")
	d.do(t, "POST", "/service/second/ctl", `{"op":"start"}`).want(t, 409, "port_taken", "0.0.0.0:8080",
		"address already in use")
	e.takePort("")
	d.do(t, "POST", "/service/second/ctl", `{"op":"start"}`).want(t, 204)
}

func TestImagesNumericUserOwnsTheBindDirectory(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can give a directory away")
	}
	for _, test := range []struct {
		imageUser, user string
		uid, gid        uint32
	}{
		{"1000", "", 1000, 0}, {"1000:1001", "", 1000, 1001}, {"1000", "2000:3", 2000, 3}, {"nobody", "", 0, 0},
		{"", "", 0, 0}, {"-5", "", 0, 0}, {"4294967295", "", 0, 0}, {"7:-1", "", 7, 0}, {"1000", "nobody", 0, 0},
		{"7:4294967294", "", 7, 0},
	} {
		e := newFakeEngine(t)
		e.addImage("img:1")
		e.images[0].user = test.imageUser
		d := startDaemon(t, e.host(), nil)
		d.do(t, "POST", "/service", createBodyJSON("web", fmt.Sprintf(`"user":%q`, test.user))).want(t, 201)
		info, err := os.Stat(filepath.Join(d.binds, "web"))
		must(t, err)
		if stat := info.Sys().(*syscall.Stat_t); stat.Uid != test.uid || stat.Gid != test.gid {
			t.Errorf("%+v: the owner is %d:%d", test, stat.Uid, stat.Gid)
		}
	}
}

func TestStopSignal(t *testing.T) {
	t.Parallel()
	e, d := start(t, nil)
	for i, test := range []struct{ value, signal string }{
		{`"SIGINT"`, "SIGINT"}, {`"INT"`, "INT"}, {`2`, "2"}, {`"2"`, "2"}, {`64`, "64"}, {`"RTMIN+3"`, "RTMIN+3"},
		{`"SIGRTMAX-14"`, "SIGRTMAX-14"}, {`"\u0054ERM"`, "TERM"},
	} {
		id := fmt.Sprint("web", i)
		d.do(t, "POST", "/service", createBodyJSON(id, `"stop_signal":`+test.value)).want(t, 201)
		if c, _ := e.container(id); c.Config.StopSignal != test.signal {
			t.Errorf("%s: the engine was told %q", test.value, c.Config.StopSignal)
		}
	}
	for _, value := range []string{`"SIGFOO"`, `0`, `65`, `-1`, `2.0`, `""x`, `"int"`, `true`, `["INT"]`, `{}`,
		`null`, `"INT "`, `"RTMIN+16"`} {
		d.do(t, "POST", "/service", createBodyJSON("bad", `"stop_signal":`+value)).want(t, 400, "")
	}
}

// Each bad value of POST /service, and what the answer must name. A value replaces that
// of createBodyJSON.
var badParams = []struct{ extra, field string }{
	{`"id":""`, "id"}, {`"id":null`, "id"}, {`"id":5`, "id"}, {`"id":["ab"]`, "id"},

	{`"image":""`, "image"}, {`"image":null`, "image"}, {`"image":7`, "image"}, {`"image":" "`, "image"},
	{`"image":"../containers/x"`, "image"}, {`"image":"a/../../b"`, "image"}, {`"image":"a?x=1"`, "image"},
	{`"image":"a#b"`, "image"}, {`"image":"a%2e"`, "image"}, {`"image":"a\nb"`, "image"},
	{`"image":"/a"`, "image"}, {`"image":"a//b"`, "image"}, {`"image":"a/"`, "image"}, {`"image":"-a"`, "image"},
	{`"image":"é"`, "image"}, {`"image":"` + strings.Repeat("g", 513) + `"`, "image"},
	// What the engine would take for the beginning of an id, perhaps of another customer's image.
	{`"image":"f5"`, "image"}, {`"image":"0"`, "image"}, {`"image":"` + strings.Repeat("a", 63) + `"`, "image"},
	{`"image":"sha256:f5"`, "image"},

	{`"bind_dir":""`, "bind_dir"}, {`"bind_dir":null`, "bind_dir"}, {`"bind_dir":3`, "bind_dir"},
	{`"bind_dir":"/"`, "bind_dir"}, {`"bind_dir":"//"`, "bind_dir"}, {`"bind_dir":"."`, "bind_dir"},
	{`"bind_dir":".."`, "bind_dir"}, {`"bind_dir":"a/../.."`, "bind_dir"}, {`"bind_dir":"/proc"`, "bind_dir"},
	{`"bind_dir":"proc/1"`, "bind_dir"}, {`"bind_dir":"/x/../proc/self"`, "bind_dir"},
	{`"bind_dir":"/sys/fs"`, "bind_dir"}, {`"bind_dir":"//dev//"`, "bind_dir"},
	{`"bind_dir":"/dev/shm"`, "bind_dir"}, {`"bind_dir":"/a\nb"`, "bind_dir"},
	{`"bind_dir":"/a\u0000"`, "bind_dir"}, {`"bind_dir":"/a\u007f"`, "bind_dir"},
	{`"bind_dir":"/\u001b[2J"`, "bind_dir"},

	{`"bind_contents":"x"`, "bind_contents"}, {`"bind_contents":"/etc/passwd"`, "bind_contents"},
	{`"bind_contents":"file:///etc/passwd"`, "bind_contents"},
	{`"bind_contents":"ftp://example.com/a"`, "bind_contents"},
	{`"bind_contents":"//example.com/a"`, "bind_contents"}, {`"bind_contents":"http://"`, "bind_contents"},
	{`"bind_contents":"http:///a"`, "bind_contents"}, {`"bind_contents":"http://["`, "bind_contents"},
	{`"bind_contents":"unix:///run/docker.sock"`, "bind_contents"}, {`"bind_contents":{}`, "bind_contents"},

	{`"cmd":"a"`, "cmd"}, {`"cmd":[1]`, "cmd"}, {`"cmd":["a\u0000"]`, "cmd"}, {`"shell":"sh"`, "shell"},
	{`"shell":["\u0000"]`, "shell"}, {`"env":{"A":"1"}`, "env"}, {`"env":["=1"]`, "env"}, {`"env":[""]`, "env"},
	{`"env":[null]`, "env"}, {`"env":["A=\u0000"]`, "env"},

	{`"user":1000`, "user"}, {`"user":"a b"`, "user"}, {`"user":":"`, "user"}, {`"user":"1:"`, "user"},
	{`"user":":1"`, "user"}, {`"user":"1:2:3"`, "user"}, {`"user":"2147483648"`, "user"},
	{`"user":"0:2147483648"`, "user"}, {`"user":"4294967296"`, "user"}, {`"user":"-1"`, "user"},
	{`"user":"99999999999999999999"`, "user"}, {`"user":"é"`, "user"}, {`"user":"a\nb"`, "user"},

	{`"working_dir":"x"`, "working_dir"}, {`"working_dir":"/proc/self/fd/8"`, "working_dir"},
	{`"working_dir":"//proc"`, "working_dir"}, {`"working_dir":"/a/../proc/1/cwd"`, "working_dir"},
	{`"working_dir":"/a\u0000"`, "working_dir"}, {`"working_dir":1`, "working_dir"},

	{`"hostname":"a_b"`, "hostname"}, {`"hostname":"-a"`, "hostname"}, {`"hostname":"a-"`, "hostname"},
	{`"hostname":"a.b"`, "hostname"}, {`"hostname":"a b"`, "hostname"}, {`"hostname":"é"`, "hostname"},
	{`"hostname":"` + strings.Repeat("a", 64) + `"`, "hostname"}, {`"hostname":"a\n"`, "hostname"},

	{`"open_stdin":"yes"`, "open_stdin"}, {`"tty":1`, "tty"}, {`"network_disabled":"true"`, "network_disabled"},

	{`"max_cpu":0`, "max_cpu"}, {`"max_cpu":-1`, "max_cpu"}, {`"max_cpu":1.5`, "max_cpu"},
	{`"max_cpu":"50000"`, "max_cpu"}, {`"max_cpu":999`, "max_cpu"}, {`"max_cpu":1e30`, "max_cpu"},
	{`"max_cpu":9223372036854775807`, "max_cpu"}, {`"max_ram":0`, "max_ram"}, {`"max_ram":-1`, "max_ram"},
	{`"max_ram":1`, "max_ram"}, {`"max_ram":6291455`, "max_ram"}, {`"max_ram":"1g"`, "max_ram"},
	{`"max_ram":9223372036854775807`, "max_ram"}, {`"max_ram":9223372036854775808`, "max_ram"},

	{`"port_map":[]`, "port_map"}, {`"port_map":"80"`, "port_map"},
	{`"port_map":{"80":{"HostPort":"80"}}`, "port_map"},
	{`"port_map":{"80/":{"HostPort":"80"}}`, "port_map"}, {`"port_map":{"/tcp":{"HostPort":"80"}}`, "port_map"},
	{`"port_map":{"":{"HostPort":"80"}}`, "port_map"}, {`"port_map":{"0/tcp":{"HostPort":"80"}}`, "port_map"},
	{`"port_map":{"65536/tcp":{"HostPort":"80"}}`, "port_map"},
	{`"port_map":{"-1/tcp":{"HostPort":"80"}}`, "port_map"},
	{`"port_map":{"080/tcp":{"HostPort":"80"}}`, "port_map"},
	{`"port_map":{"80/TCP":{"HostPort":"80"}}`, "port_map"},
	{`"port_map":{"80/icmp":{"HostPort":"80"}}`, "port_map"},
	{`"port_map":{"80/tcp/udp":{"HostPort":"80"}}`, "port_map"},
	{`"port_map":{"80-90/tcp":{"HostPort":"80"}}`, "port_map"},
	{`"port_map":{"80/tcp ":{"HostPort":"80"}}`, "port_map"},
	{`"port_map":{"80/tcp":null}`, "port_map"}, {`"port_map":{"80/tcp":5}`, "port_map"},
	{`"port_map":{"80/tcp":"80"}`, "port_map"},
	{`"port_map":{"80/tcp":[]}`, "port_map"}, {`"port_map":{"80/tcp":[null]}`, "port_map"},
	{`"port_map":{"80/tcp":[[]]}`, "port_map"},
	{`"port_map":{"80/tcp":{}}`, "HostPort"}, {`"port_map":{"80/tcp":{"HostPort":80}}`, "HostPort"},
	{`"port_map":{"80/tcp":{"HostPort":""}}`, "HostPort"},
	{`"port_map":{"80/tcp":{"HostPort":"65536"}}`, "HostPort"},
	{`"port_map":{"80/tcp":{"HostPort":"-1"}}`, "HostPort"},
	{`"port_map":{"80/tcp":{"HostPort":"80-90"}}`, "HostPort"},
	{`"port_map":{"80/tcp":{"HostPort":"http"}}`, "HostPort"},
	{`"port_map":{"80/tcp":[{"HostPort":"1"},{"HostPort":"x"}]}`, "HostPort"},
	{`"port_map":{"80/tcp":{"HostPort":"1","HostIp":"x"}}`, "HostIp"},
	{`"port_map":{"80/tcp":{"HostPort":"1","HostIp":"1.2.3"}}`, "HostIp"},
	{`"port_map":{"80/tcp":{"HostPort":"1","HostIp":"localhost"}}`, "HostIp"},
	{`"port_map":{"80/tcp":{"HostPort":"1","HostIp":7}}`, "HostIp"},
	{`"port_map":{"80/tcp":{"HostPort":"1","HostIp":"fe80::1%eth0"}}`, "HostIp"},

	{`"port_map":{"80/tcp":{"HostPort":"1"}},"network_disabled":true`, "port_map"},

	// Null is not the value that a field has when it is absent: a limit would be none.
	{`"max_ram":null`, "max_ram"}, {`"max_cpu":null`, "max_cpu"},
	{`"network_disabled":null`, "network_disabled"}, {`"open_stdin":null`, "open_stdin"}, {`"tty":null`, "tty"},
	{`"user":null`, "user"}, {`"port_map":null`, "port_map"},
	{`"port_map":{"80/tcp":{"HostPort":"1","HostIp":null}}`, "HostIp"}, {`"cmd":null`, "cmd"},
	{`"cmd":["a",null]`, "cmd"}, {`"bind_contents":null`, "bind_contents"}, {`"hostname":null`, "hostname"},
	{`"working_dir":null`, "working_dir"},

	// A mistyped limit must not become no limit, and nothing asks for more than the seed has.
	{`"max_memory":1`, "max_memory"}, {`"privileged":true`, "privileged"}, {`"Binds":["/:/host"]`, "Binds"},
	{`"HostConfig":{}`, "HostConfig"}, {`"devices":[]`, "devices"},
	{`"port_map":{"80/tcp":{"HostPort":"1","Host":"x"}}`, "Host"},
	{`"port_map":{"80/tcp":[{"HostPort":"1"},{"HostPort":"2","x":1}]}`, "x"},
}

func TestBadServiceLeavesNothing(t *testing.T) {
	t.Parallel()
	e, d := start(t, nil)
	before, callsBefore := state(t, e, d), len(e.calls())
	bodies := map[string]string{
		`{"params":{"id":"web","image":"img:1","bind_dir":"/data"}}`:                 "type",
		`{"type":null,"params":{"id":"web","image":"img:1","bind_dir":"/data"}}`:     "type",
		`{"type":"docker","params":{"id":"web","image":"img:1","bind_dir":"/data"}}`: "type",
		`{"type":"RAW","params":{"id":"web","image":"img:1","bind_dir":"/data"}}`:    "type",
		`{"type":["raw"],"params":{"id":"web","image":"img:1","bind_dir":"/data"}}`:  "type",
		`{"type":"raw"}`:                "id",
		`{"type":"raw","params":null}`:  "params",
		`{"type":"raw","params":[]}`:    "params",
		`{"type":"raw","params":"web"}`: "params",
		`{"type":"raw","id":"web"}`:     "id",
		`{"type":"raw","params":{"id":"web","image":"img:1","bind_dir":"/data"},"start":true}`: "start",
		`{"type":"raw","params":{"id":"web","bind_dir":"/data"}}`:                              "image",
		`{"type":"raw","params":{"id":"web","image":"img:1"}}`:                                 "bind_dir",
	}
	for _, bad := range badParams {
		bodies[createBodyJSON("web", bad.extra)] = bad.field
	}
	for body, field := range bodies {
		a := d.do(t, "POST", "/service", body)
		if a.status != 400 || !strings.Contains(a.body, field) {
			t.Errorf("%s: %d %s, want 400 and %q", body, a.status, a.body, field)
		}
		if after := state(t, e, d); after != before {
			t.Fatalf("%s left %s", body, after)
		}
	}
	e.wantAskedNothing(t, callsBefore)
}

// What only the SDK or the engine can see to be wrong is still the client's mistake.
func TestServiceThatTheEngineRefusesLeavesNothing(t *testing.T) {
	t.Parallel()
	e, d := start(t, nil)
	imported := d.do(t, "POST", "/docker/image", wholeTar()).want(t, 201)
	var answer struct {
		ID string `json:"image_id"`
	}
	must(t, json.Unmarshal([]byte(imported.body), &answer))
	before := state(t, e, d)
	for _, test := range []struct {
		extra  string
		status int
		text   string
	}{
		{`"image":"` + answer.ID + `"`, 400, e.dialect.noCommand},
		{`"image":"IMG:1"`, 400, "image"},
		{`"image":"a:b:c"`, 400, "image"},
		{`"image":"img:"`, 400, "image"},
		{`"image":"img@sha256:zz"`, 400, "image"},
		{`"image":"img:` + strings.Repeat("a", 129) + `"`, 400, "image"},
		{`"image":"` + strings.Repeat("ab", 32) + `"`, 404, "abab"},
		{`"image":"no-such-image:1"`, 404, "no-such-image"},
		{`"image":"example.com:5000/no/image"`, 404, "example.com:5000/no/image"},
		{`"image":"sha256:` + strings.Repeat("ab", 32) + `"`, 404, "sha256:abab"},
	} {
		a := d.do(t, "POST", "/service", createBodyJSON("web", test.extra))
		if a.status != test.status || !strings.Contains(a.body, test.text) {
			t.Errorf("%s: %d %s, want %d and %q", test.extra, a.status, a.body, test.status, test.text)
		}
		if after := state(t, e, d); after != before {
			t.Fatalf("%s left %s", test.extra, after)
		}
	}
}

// Ids that are none, as they stand in a path and as they stand in JSON.
var badIDs = []struct{ path, json string }{
	{"..", `".."`}, {"%2e%2e", `"%2e%2e"`}, {".%2e", `".%2e"`}, {".", `"."`}, {"%2F", `"/"`}, {"a%2Fb", `"a/b"`},
	{"..%2Fcontainers", `"../containers"`}, {"web%2F..%2F..%2Fimages", `"web/../../images"`},
	{"%2Fetc%2Fpasswd", `"/etc/passwd"`}, {"web%2Fjson%3F", `"web/json?"`}, {"web%3Fforce=1", `"web?force=1"`},
	{"web%23", `"web#"`}, {"web%00", `"web\u0000"`}, {"%00", `"\u0000"`}, {"a:b", `"a:b"`}, {"a.b", `"a.b"`},
	{"web.", `"web."`}, {".web", `".web"`}, {".new.web", `".new.web"`},
	{"duxcore.candidate.web", `"duxcore.candidate.web"`}, {"duxcore.gone.web", `"duxcore.gone.web"`},
	{"-web", `"-web"`}, {"_web", `"_web"`}, {"w", `"w"`}, {"7", `"7"`},
	{strings.Repeat("w", 64), `"` + strings.Repeat("w", 64) + `"`},
	{strings.Repeat("0", 64), `"` + strings.Repeat("0", 64) + `"`},
	{strings.Repeat("w", 4000), `"` + strings.Repeat("w", 4000) + `"`}, {"we%20b", `"we b"`},
	{"%20web", `" web"`}, {"web%20", `"web "`}, {"web%0A", `"web\n"`}, {"%0Aweb", `"\nweb"`},
	{"web%09", `"web\t"`}, {"w%C3%A9b", `"wéb"`}, {"%D1%80web", `"рweb"`}, {"%EF%BD%97eb", `"ｗeb"`},
	{"web%E2%80%8B", `"web\u200b"`}, {"%D9%A1%D9%A2", `"١٢"`}, {"we%FFb", `"we\ufffdb"`},
	{"web%E2%80%AE", `"web\u202e"`}, {"w%5Cb", `"w\\b"`}, {"web*", `"web*"`}, {"web;x", `"web;x"`},
	{"web,db", `"web,db"`}, {"%25web", `"%web"`}, {"$web", `"$web"`}, {"~web", `"~web"`}, {"web@", `"web@"`},
	{"%22web%22", `"\"web\""`},
}

func TestIDsThatAreNoneReachNothing(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	foreign := e.addForeign("foreign", nil)
	before, callsBefore := state(t, e, d), len(e.calls())
	ids := append(slices.Clone(badIDs), struct{ path, json string }{foreign, `"` + foreign + `"`})
	for _, id := range ids {
		d.do(t, "POST", "/service", createBodyJSON("x", `"id":`+id.json)).want(t, 400, "id")
		for _, call := range serviceCalls {
			method, rest, body := call.method, call.path, call.body
			a, _ := sendRaw(t, d, d.head(method+" /service/"+id.path+rest)+
				"Content-Length: "+strconv.Itoa(len(body))+"\r\nConnection: close\r\n\r\n"+body)
			if a.want(t, 404); strings.Contains(a.body, d.binds) {
				t.Errorf("an error shows a path of the host: %s", a.body)
			}
		}
		if after := state(t, e, d); after != before {
			t.Fatalf("%s left %s", id.path, after)
		}
	}
	e.wantAskedNothing(t, callsBefore)
}

// serviceCalls are all requests to one service; their paths follow /service/{id}.
var serviceCalls = []struct{ method, path, body string }{
	{"GET", "", ""}, {"GET", "/stats", ""}, {"GET", "/stats?stream=true", ""},
	{"POST", "/ctl", `{"op":"start"}`}, {"POST", "/ctl", `{"op":"stop"}`}, {"POST", "/ctl", `{"op":"restart"}`},
	{"POST", "/ctl", `{"op":"kill"}`}, {"PATCH", "/env", `{"A":"1"}`}, {"DELETE", "", ""},
}

// Asked for a service of this name, the engine finds the container by the beginning of its id.
func TestContainerOfAnotherNameIsNoService(t *testing.T) {
	t.Parallel()
	e, d := start(t, nil)
	const id = "abcdef123456"
	d.do(t, "POST", "/service", createBodyJSON(id, "")).want(t, 201)
	c := e.byName(id)
	c.ID, c.Name = id+c.ID[len(id):], "renamed"
	d.do(t, "GET", "/service/"+id, "").want(t, 409, "renamed_by_hand")
}

func TestContainersOfOthersAreNotServices(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	labels := func(id, binds string) map[string]string {
		return map[string]string{"duxcore.service": id, "duxcore.binds": binds,
			"duxcore.params": createBodyJSON(id, "")}
	}
	ids := []string{"unlabelled", "other-daemon", "other-id", "committed", "no-service", "longer"}
	// Each of these lacks one thing alone that a service has.
	full := e.addForeign("unlabelled", nil, d.binds+"/unlabelled")
	e.addForeign("other-daemon", labels("other-daemon", d.binds+"2"), d.binds+"/other-daemon")
	e.addForeign("other-id", labels("web", d.binds), d.binds+"/other-id")
	e.addForeign("committed", labels("committed", d.binds)) // of an image that a docker commit of a service made
	e.addForeign("no-service", map[string]string{"duxcore.binds": d.binds}, d.binds+"/no-service")
	e.addForeign("longer", labels("longe", d.binds), d.binds+"/longer")
	e.addForeign(candidatePrefix+"half", labels("half", d.binds+"2"))
	e.addForeign("duxcore.gone.dead", nil)
	// The engine answers to this one's id, and its labels speak of that.
	renamed := labels("", d.binds)
	short := e.addForeign("somebody-elses", renamed)[:12]
	renamed["duxcore.service"] = short
	ids = append(ids, short, "half", "dead", full[:2], full[:12], full[:63])
	// Two whose ids begin alike: asked for what they share, the engine answers 500.
	first := map[string]bool{full[:2]: true}
	for {
		id := e.addForeign("", nil)
		if first[id[:2]] {
			ids = append(ids, id[:2])
			break
		}
		first[id[:2]] = true
	}
	before := state(t, e, d)
	for _, id := range ids {
		for _, call := range serviceCalls {
			d.do(t, call.method, "/service/"+id+call.path, call.body).want(t, 404, id)
		}
	}
	if list := d.do(t, "GET", "/service", "").want(t, 200, `"/web"`); strings.Count(list.body, `"Id"`) != 1 {
		t.Errorf("the list is %s", list.body)
	}
	wantState(t, e, d, before)
	for _, taken := range []string{"unlabelled", "other-daemon", "committed"} {
		d.do(t, "POST", "/service", createBodyJSON(taken, "")).want(t, 409, taken)
	}
	wantState(t, e, d, before)
}

func TestServiceNamedLikeThePrefixOfAnID(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	foreign := e.addForeign("foreign", nil)
	before := state(t, e, d)
	id := foreign[:8]
	d.do(t, "POST", "/service", createBodyJSON(id, "")).want(t, 201)
	for _, call := range serviceCalls {
		if !strings.Contains(call.path, "stream") &&
			d.do(t, call.method, "/service/"+id+call.path, call.body).status >= 300 {
			t.Errorf("%s %s of %s failed", call.method, call.path, id)
		}
	}
	d.do(t, "GET", "/service/"+id, "").want(t, 404)
	wantState(t, e, d, before)
}

// FuzzServiceID sends any id everywhere that one is accepted. All that the engine may
// then be asked about is that id or a container made for it.
func FuzzServiceID(f *testing.F) {
	for _, id := range badIDs {
		f.Add(id.path)
		var decoded string
		must(f, json.Unmarshal([]byte(id.json), &decoded))
		f.Add(decoded)
	}
	for _, good := range []string{"web", "a1", "A_b-9", strings.Repeat("z", 63), "containers", "json", "create",
		"service", "ctl"} {
		f.Add(good)
	}
	e := newFakeEngine(f)
	e.addImage("img:1")
	e.addForeign("foreign", nil)
	d := startDaemon(f, e.host(), nil)
	d.fuzzed = true
	before := state(f, e, d)
	f.Fuzz(func(t *testing.T, id string) {
		// As it stands in a path, an id ends where that goes on.
		inPath, _ := url.PathUnescape(id[:strings.IndexAny(id+"/", "/?")])
		made := map[string]bool{}
		var asked []string
		var mu sync.Mutex
		e.setIntercept(func(_ http.ResponseWriter, r *http.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			if filter := r.URL.Query().Get("filters"); filter != "" && !strings.Contains(filter, "duxcore.service") {
				return false // the daemon looks after all services once a minute
			}
			for _, name := range e.names() {
				if name == id || name == candidatePrefix+id {
					c, _ := e.container(name)
					made[c.ID] = true
				}
			}
			asked = append(asked, versionPrefix.ReplaceAllString(r.URL.EscapedPath(),
				"")+"?"+r.URL.Query().Get("name"))
			return false
		})
		body, err := json.Marshal(map[string]any{"type": "raw",
			"params": map[string]string{"id": id, "image": "img:1", "bind_dir": "/data"}})
		must(t, err)
		if a := d.do(t, "POST", "/service", string(body)); (a.status == 201) != plainID(id) {
			t.Errorf("create %q: %d %s", id, a.status, a.body)
		}
		for _, call := range serviceCalls {
			if strings.Contains(call.path, "stream") {
				continue
			}
			d.do(t, call.method, "/service/"+url.PathEscape(id)+call.path, call.body)
			raw := d.request(t, call.method, "/", strings.NewReader(call.body))
			raw.URL.Opaque = "/service/" + id + call.path
			if response, err := d.client.Do(raw); err == nil { // else no request line can hold it
				response.Body.Close()
			}
		}
		e.setIntercept(nil)
		mu.Lock()
		defer mu.Unlock()
		for _, call := range asked {
			path, name, _ := strings.Cut(call, "?")
			kind, rest, _ := strings.Cut(path[1:], "/")
			about, _, _ := strings.Cut(rest, "/")
			candidate := strings.TrimPrefix(name, candidatePrefix)
			switch {
			case plainID(inPath) && (path == "/containers/json" || path == "/containers/"+inPath+"/json"):
			case !plainID(id):
				t.Errorf("id %q made the daemon ask the engine %s", id, call)
			case path == "/containers/json" || path == "/images/img:1/json":
			case path == "/containers/create" && candidate == id:
			case kind == "containers" && (about == id || made[about]) && (name == "" || name == id || candidate == id):
			default:
				t.Errorf("id %q made the daemon ask the engine %s", id, call)
			}
		}
		if after := state(t, e, d); after != before {
			t.Fatalf("id %q left %s", id, after)
		}
	})
}

// plainID says in other words than the daemon what an id is.
func plainID(id string) bool {
	return len(id) >= 2 && len(id) <= 63 && id[0] != '-' && id[0] != '_' &&
		strings.IndexFunc(id, func(r rune) bool { return !strings.ContainsRune(idCharacters, r) }) < 0
}

const idCharacters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"

// granted has the daemon create a service and returns all that the engine was asked to
// give it, a field a line, without those that are zero and so the engine's default.
func granted(t *testing.T, change func(*config), extra string) string {
	t.Helper()
	e, d := start(t, change)
	sent := make(chan []byte, 1)
	e.setIntercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/containers/create") {
			body, _ := io.ReadAll(r.Body)
			r.Body = io.NopCloser(bytes.NewReader(body))
			sent <- body
		}
		return false
	})
	d.do(t, "POST", "/service", createBodyJSON("web", extra)).want(t, 201)
	var config map[string]any
	must(t, json.Unmarshal(<-sent, &config))
	host := config["HostConfig"].(map[string]any)
	delete(config, "HostConfig")
	lines := strings.ReplaceAll(fieldLines("", config)+fieldLines("HostConfig.", host), d.binds, "BINDS")
	lines = regexp.MustCompile(`Image "sha256:[0-9a-f]{64}"`).ReplaceAllString(lines, `Image "IMAGE"`)
	return regexp.MustCompile(`"duxcore.revision":"[A-Z2-7]{26}"`).ReplaceAllString(lines,
		`"duxcore.revision":"RANDOM"`)
}

func fieldLines(prefix string, fields map[string]any) string {
	var text strings.Builder
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		value, _ := json.Marshal(fields[name])
		if !slices.Contains([]string{"null", `""`, "0", "false", "[]", "{}", "[0,0]"}, string(value)) {
			text.WriteString(prefix + name + " " + string(value) + "\n")
		}
	}
	return text.String()
}

// CVE-2023-32080 and others: no service may have more than what is written here.
func TestEverythingThatAServiceIsGranted(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		change func(*config)
		extra  string
		want   string
	}{
		{"minimal", nil, "", minimalGrant},
		{"without a network", nil, `"network_disabled":true`, strings.NewReplacer(
			"OpenStdin ", "NetworkDisabled true\nOpenStdin ",
			"HostConfig.PidsLimit ", "HostConfig.NetworkMode \"none\"\nHostConfig.PidsLimit ").Replace(minimalGrant)},
		{"maximal", func(c *config) {
			c.network, c.pidsLimit, c.stopTimeout = "tenants", 100, 7*time.Second
		}, maximal, `Cmd ["run","--all"]
Env ["A=1","B=x y=z"]
ExposedPorts {"53/udp":{},"80/tcp":{},"9/sctp":{}}
Healthcheck {"Test":["NONE"]}
Hostname "web-1"
Image "IMAGE"
Labels {"duxcore.binds":"BINDS","duxcore.revision":"RANDOM","duxcore.service":"web"}
Shell ["/bin/sh","-c"]
StopTimeout 7
User "1000:1001"
WorkingDir "/srv"
HostConfig.CapDrop ["CAP_AUDIT_WRITE","CAP_MKNOD","CAP_NET_RAW","CAP_SETFCAP","CAP_SETPCAP"]
HostConfig.CgroupnsMode "private"
HostConfig.CpuPeriod 100000
HostConfig.CpuQuota 50000
HostConfig.IpcMode "private"
HostConfig.LogConfig {"Config":{"max-file":"3","max-size":"10m"},"Type":"json-file"}
HostConfig.Memory 67108864
HostConfig.MemorySwap 67108864
HostConfig.Mounts [{"Source":"BINDS/web","Target":"/x:/etc:ro","Type":"bind"}]
HostConfig.NetworkMode "tenants"
HostConfig.PidsLimit 100
HostConfig.PortBindings {"53/udp":[{"HostIp":"::1","HostPort":"53"}],` +
			`"80/tcp":[{"HostIp":"127.0.0.1","HostPort":"8080"},{"HostIp":"","HostPort":"0"}],` +
			`"9/sctp":[{"HostIp":"","HostPort":"9"}]}
HostConfig.RestartPolicy {"MaximumRetryCount":0,"Name":"no"}
HostConfig.SecurityOpt ["no-new-privileges"]
`},
	} {
		if got := granted(t, test.change, test.extra); got != test.want {
			t.Errorf("%s: got\n%s\nwant\n%s", test.name, got, test.want)
		}
	}
}

const minimalGrant = `Healthcheck {"Test":["NONE"]}
Image "IMAGE"
Labels {"duxcore.binds":"BINDS","duxcore.revision":"RANDOM","duxcore.service":"web"}
OpenStdin true
StopTimeout 30
Tty true
HostConfig.CapDrop ["CAP_AUDIT_WRITE","CAP_MKNOD","CAP_NET_RAW","CAP_SETFCAP","CAP_SETPCAP"]
HostConfig.CgroupnsMode "private"
HostConfig.IpcMode "private"
HostConfig.LogConfig {"Config":{"max-file":"3","max-size":"10m"},"Type":"json-file"}
HostConfig.Mounts [{"Source":"BINDS/web","Target":"/data","Type":"bind"}]
HostConfig.PidsLimit 2048
HostConfig.RestartPolicy {"MaximumRetryCount":0,"Name":"no"}
HostConfig.SecurityOpt ["no-new-privileges"]
`

const maximal = `"bind_dir":"x:/etc:ro","bind_contents":"","cmd":["run","--all"],"shell":["/bin/sh","-c"],` +
	`"user":"1000:1001",` +
	`"working_dir":"/srv","env":["A=1","B=x y=z"],"open_stdin":false,"tty":false,"hostname":"web-1",` +
	`"network_disabled":false,` +
	`"port_map":{"80/tcp":[{"HostIp":"127.0.0.1","HostPort":"8080"},{"HostPort":"0"}],` +
	`"53/udp":{"HostIp":"::1","HostPort":"53"},` +
	`"9/sctp":{"HostPort":"9"}},"max_cpu":50000,"max_ram":67108864`

// The container of a service is gone, and somebody else's has its name. Each of these lacks one thing alone
// that the service's has: the mount, the bind root's label, or the service's.
func TestContainerInThePlaceOfAServicesIsNotTaken(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(labels map[string]string, dir string) (mounts []string){
		"no mount": func(map[string]string, string) []string { return nil },
		"mounts":   func(_ map[string]string, dir string) []string { return []string{dir + "2", "/srv"} },
		"root":     func(l map[string]string, dir string) []string { l[labelBinds] += "2"; return []string{dir} },
		"service": func(l map[string]string, dir string) []string {
			l[labelService] = "other"
			return []string{dir, filepath.Join(filepath.Dir(dir), "other")}
		},
	} {
		e, d := startWithService(t)
		own, _ := e.container("web")
		labels := maps.Clone(own.Labels)
		mounts := change(labels, filepath.Join(d.binds, "web"))
		e.drop("web")
		foreign := e.addForeign("web", labels, mounts...)
		before := state(t, e, d)
		for _, call := range serviceCalls {
			if call.method == "PATCH" || strings.Contains(call.path, "stats") { // the record alone; may hang
				continue
			}
			a := d.do(t, call.method, "/service/web"+call.path, call.body)
			if a.status < 400 {
				t.Errorf("%s: %s %s: %d %s", name, call.method, call.path, a.status, a.body)
			}
		}
		if list := d.do(t, "GET", "/service", "").want(t, 200).body; strings.Contains(list, foreign) {
			t.Errorf("%s: the list is %s", name, list)
		}
		d.do(t, "DELETE", "/service/web", "").want(t, 409, "id_taken")
		e.drop(candidatePrefix + "web") // of the service: a start has made it
		wantState(t, e, d, before)
	}
}

// A service that is being deleted does not exist, whatever is left of it.
func TestListLeavesOutWhatIsBeingDeleted(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	c, _ := e.container("web")
	e.answerWith("/containers/"+c.ID, 500, `{"message":"not now"}`)
	d.do(t, "DELETE", "/service/web", "").want(t, 502, "not now")
	d.do(t, "GET", "/service/web", "").want(t, 404)
	if list := d.do(t, "GET", "/service", "").want(t, 200).body; list != "[]\n" {
		t.Errorf("the list is %s", list)
	}
}
