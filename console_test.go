package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/docker/docker/pkg/stdcopy"
)

// logStream is an answer to GET /service/{id}/logs that a test reads as it comes.
type logStream struct {
	header http.Header
	text   *syncBuffer
	ended  chan error // nil: in an orderly way
	leave  func()
}

func logsOpen(t testing.TB, d *daemon, path string) logStream {
	t.Helper()
	response, err := d.client.Do(d.request(t, "GET", path, nil))
	if err != nil {
		t.Fatal(err)
	}
	if response.StatusCode != 200 {
		text, _ := io.ReadAll(response.Body)
		t.Fatalf("status %d: %s", response.StatusCode, text)
	}
	l := logStream{response.Header, &syncBuffer{}, make(chan error, 1), sync.OnceFunc(func() { response.Body.Close() })}
	t.Cleanup(l.leave)
	go func() { // ends with the stream, or when the test leaves it
		_, err := io.Copy(l.text, response.Body)
		l.ended <- err
	}()
	return l
}

func (l logStream) wait(t testing.TB, text string) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%.40q in the logs", text), func() bool { return strings.Contains(l.text.String(), text) })
}

// end returns how the stream ends.
func (l logStream) end(t testing.TB) error {
	t.Helper()
	select {
	case err := <-l.ended:
		return err
	case <-time.After(patience):
		t.Fatal("the stream did not end in", patience)
	}
	return nil
}

// stdinRequest is a POST /service/{id}/stdin whose body stays open.
type stdinRequest struct {
	*io.PipeWriter
	answered <-chan answer // closed without one if the connection breaks
}

func stdinOpen(t testing.TB, d *daemon, id string) stdinRequest {
	t.Helper()
	body, w := io.Pipe()
	answered := make(chan answer, 1)
	t.Cleanup(func() { w.CloseWithError(errors.New("the test is over")) })
	r := d.request(t, "POST", "/service/"+id+"/stdin", body)
	go func() { // ends with the body, or with the answer
		defer close(answered)
		response, err := d.client.Do(r)
		if err != nil {
			body.CloseWithError(err)
			return
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		body.CloseWithError(errors.New("answered"))
		if err == nil {
			answered <- answer{response.StatusCode, response.Header, string(text)}
		}
	}()
	return stdinRequest{w, answered}
}

// answer returns the answer, or status 0 if the connection broke.
func (r stdinRequest) answer(t testing.TB) answer {
	t.Helper()
	select {
	case a := <-r.answered:
		return a
	case <-time.After(patience):
		t.Fatal("no answer in", patience)
	}
	return answer{}
}

// consoleStart starts a daemon with a running service, and the fields in extra.
func consoleStart(t *testing.T, extra string, change func(*config)) (*fakeEngine, *daemon) {
	t.Helper()
	e := newFakeEngine(t)
	e.addImage("img:1")
	d := startDaemon(t, e.host(), change)
	consoleService(t, d, "web", extra)
	return e, d
}

func consoleService(t *testing.T, d *daemon, id, extra string) {
	t.Helper()
	d.do(t, "POST", "/service", createBodyJSON(id, extra)).want(t, 201)
	d.do(t, "POST", "/service/"+id+"/ctl", `{"op":"start"}`).want(t, 204)
}

// consoleCalls returns the calls to the engine that have the text in them.
func consoleCalls(e *fakeEngine, text string) (found []string) {
	for _, call := range e.calls() {
		if strings.Contains(call, text) {
			found = append(found, call)
		}
	}
	return found
}

// consoleHook has f answer the engine's calls whose path ends so, and reports when one is over.
func consoleHook(e *fakeEngine, suffix string, f func(w http.ResponseWriter, r *http.Request)) (over chan struct{}) {
	over = make(chan struct{}, 1000)
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, suffix) {
			return false
		}
		defer func() { over <- struct{}{} }()
		f(w, r)
		return true
	})
	return over
}

func TestLogsAreWhatTheServiceHasPrinted(t *testing.T) {
	t.Parallel()
	binary := string(bytes.Join([][]byte{{0, 1, 2, 0, 0, 0, 0, 9, 255}, []byte("\r\n\x1b[0m")}, nil))
	for _, tty := range []bool{true, false} {
		t.Run(fmt.Sprintf("tty %v", tty), func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, fmt.Sprintf(`"tty":%v`, tty), nil)
			wantLogs := func(query, want string) {
				t.Helper()
				a := d.do(t, "GET", "/service/web/logs"+query, "").want(t, 200)
				if got := a.header.Get("Content-Type"); a.body != want || got != "application/octet-stream" {
					t.Errorf("logs%s: %s %q, want %q", query, got, a.body, want)
				}
			}
			wantLogs("", "")
			e.print("web", stdcopy.Stdout, "out 1\n")
			e.print("web", stdcopy.Stderr, "err 1\n")
			e.print("web", stdcopy.Stdout, binary)
			e.print("web", stdcopy.Stderr, strings.Repeat("long", 100_000)+"\n")
			out, errs := "out 1\n"+binary, "err 1\n"+strings.Repeat("long", 100_000)+"\n"
			all := "out 1\nerr 1\n" + binary + strings.Repeat("long", 100_000) + "\n"
			wantLogs("", all)
			wantLogs("?follow=false&tail=all&stdout=true&stderr=true", all)
			wantLogs("?stderr=false", out)
			wantLogs("?stdout=false", errs)
			d.do(t, "GET", "/service/web/logs?stdout=false&stderr=false", "").want(t, 400)
			d.do(t, "POST", "/service/web/ctl", `{"op":"kill"}`).want(t, 204)
			wantLogs("", all)
			wantLogs("?follow=true", all)
		})
	}
}

func TestLogsOfAServiceThatNeverRan(t *testing.T) {
	t.Parallel()
	_, d := startWithService(t)
	for _, query := range []string{"", "?follow=true"} {
		if a := d.do(t, "GET", "/service/web/logs"+query, "").want(t, 200); a.body != "" {
			t.Errorf("logs%s: %q", query, a.body)
		}
	}
	d.do(t, "GET", "/service/nobody/logs", "").want(t, 404)
	d.do(t, "GET", "/service/nobody/logs?follow=true", "").want(t, 404)
}

func TestLogsAskTheEngineWhatTheClientAsks(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", nil)
	for query, want := range map[string]string{
		"":                                   "stderr=1&stdout=1&tail=",
		"?tail=0":                            "stderr=1&stdout=1&tail=0",
		"?tail=999999999":                    "stderr=1&stdout=1&tail=999999999",
		"?tail=all&timestamps=1":             "stderr=1&stdout=1&tail=all&timestamps=1",
		"?since=1700000000":                  "since=1700000000&stderr=1&stdout=1&tail=",
		"?since=0&until=0":                   "since=0&stderr=1&stdout=1&tail=&until=0",
		"?until=1.000000001":                 "stderr=1&stdout=1&tail=&until=1.000000001",
		"?stdout=0&timestamps=0":             "stderr=1&tail=",
		"?since=9999999999.5&st%64err=false": "since=9999999999.5&stdout=1&tail=",
		// As the engine prints times, which it does not take.
		"?since=2026-11-30T06:04:07.417825910Z":               "since=1796018647.417825910&stderr=1&stdout=1&tail=",
		"?until=2026-11-30T06:04:07Z":                         "stderr=1&stdout=1&tail=&until=1796018647.000000000",
		"?since=2026-11-30T08:04:07%2B02:00":                  "since=1796018647.000000000&stderr=1&stdout=1&tail=",
		"?stdout=0&until=2026-11-30T00:34:07.000000001-05:30": "stderr=1&tail=&until=1796018647.000000001",
	} {
		before := len(consoleCalls(e, "/logs?"))
		d.do(t, "GET", "/service/web/logs"+query, "").want(t, 200)
		calls := consoleCalls(e, "/logs?")[before:]
		if len(calls) != 1 || !strings.HasSuffix(calls[0], "/logs?"+want) {
			t.Errorf("logs%s asked the engine %q, want %s", query, calls, want)
		}
	}
}

// badLogsQueries have, by the query, what the description must name.
var badLogsQueries = map[string]string{
	"tale=1": "tale", "Follow=true": "Follow", "stream=true": "stream", "details=1": "details", "%20tail=1": "tail", "=1": "", "&&x": "x",
	"follow": "follow", "follow=": "follow", "follow=maybe": "follow", "follow=2": "follow", "follow=true,true": "follow", "follow=true%00": "follow",
	"follow=true&follow=true": "follow", "follow=true&follow=false": "follow", "follow=true&follow=": "follow",
	"timestamps=yes": "timestamps", "stdout=-1": "stdout", "stderr=%0atrue": "stderr", "stderr=true%0a": "stderr", "stdout=0&stdout=1": "stdout",
	"tail=": "tail", "tail=-1": "tail", "tail=1.5": "tail", "tail=1e3": "tail", "tail=+1": "tail", "tail=ALL": "tail", "tail=all%0a": "tail", "tail=0x10": "tail",
	"tail=1&tail=1": "tail", "tail=all&tail=all": "tail", "tail=99999999999999999999": "tail", "tail=%D9%A3": "tail", "tail=1%26follow=true": "tail",
	"since=": "since", "since=-1": "since", "since=1e9": "since", "since=10m": "since", "since=2022-05-08": "since", "since=.5": "since", "since=1.": "since",
	"since=1.1234567890": "since", "since=NaN": "since", "since=1&since=2": "since", "until=1,5": "until", "until=99999999999": "until", "until=%2B1": "until",
	"since=2022-05-08T19:50:43": "since", "since=2022-13-08T19:50:43Z": "since", "until=2022-02-30T19:50:43Z": "until", "until=2022-05-08T24:00:00Z": "until",
	"since=2022-05-08t19:50:43z": "since", "since=2022-05-08T19:50:43+02:00": "since", "since=2022-05-08T19:50:43%2B0200": "since",
	"since=2022-05-08T19:50:43.0000000001Z": "since", "since=2022-05-08T19:50:43.Z": "since", "until=2022-05-08T19:50:43,5Z": "until",
	"since=2022-05-08T19:50:43Z&since=1": "since", "until=2022-05-08T:::::::::Z": "until", "since=2022-05-08T19:50:43%2B99:99": "since",
	"until=1%20": "until", "until=1 ": "",
	"tail=1;follow=true": "query", ";": "query", "tail=%zz": "query", "%": "query", "follow=true&%f": "query", "tail=1&since=%": "query",
}

func TestBadLogsQueriesAreNamedAndReachNothing(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", nil)
	before := len(e.calls())
	for query, named := range badLogsQueries {
		if strings.Contains(query, " ") {
			continue // no HTTP
		}
		a, _ := sendRaw(t, d, "GET /service/web/logs?"+query+" HTTP/1.1\r\nHost: h\r\nX-Duxcore-CoreKey: "+d.key+"\r\n\r\n")
		a.want(t, 400, named)
	}
	long := d.do(t, "GET", "/service/web/logs?"+strings.Repeat("x", 8000)+"=1", "").want(t, 400)
	if len(long.body) > 1000 {
		t.Errorf("the answer to a long name has %d bytes", len(long.body))
	}
	e.wantAskedNothing(t, before)
}

func TestFollowSendsWhatIsPrintedAsItIs(t *testing.T) {
	t.Parallel()
	for _, tty := range []bool{true, false} {
		t.Run(fmt.Sprintf("tty %v", tty), func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, fmt.Sprintf(`"tty":%v`, tty), nil)
			l := logsOpen(t, d, "/service/web/logs?follow=true") // the header is here, though nothing was printed
			if got := l.header.Get("Content-Type"); got != "application/octet-stream" {
				t.Errorf("Content-Type %q", got)
			}
			want := ""
			for i := range 50 { // nothing is printed before the earlier has arrived
				text := fmt.Sprintf("%d without a line's end", i)
				e.print("web", stdcopy.StdType(1+i%2), text)
				l.wait(t, text)
				want += text
			}
			d.do(t, "POST", "/service/web/ctl", `{"op":"stop"}`).want(t, 204)
			if err := l.end(t); err != nil || l.text.String() != want {
				t.Errorf("%v: %q, want %q", err, l.text, want)
			}
		})
	}
}

// consoleEnds are what ends a service's run.
var consoleEnds = map[string]func(*testing.T, *fakeEngine, *daemon){
	"stop":   statsEnds["stop"],
	"kill":   statsEnds["kill"],
	"delete": statsEnds["delete"],
	"its process's end": func(t *testing.T, e *fakeEngine, d *daemon) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.byName("web").Running = false
		e.change()
	},
	"restart": func(t *testing.T, e *fakeEngine, d *daemon) {
		d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
	},
	"restart with another environment": func(t *testing.T, e *fakeEngine, d *daemon) {
		d.do(t, "PATCH", "/service/web/env", `{"A":"1"}`).want(t, 204)
		d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
	},
	"delete and create": func(t *testing.T, e *fakeEngine, d *daemon) {
		d.do(t, "DELETE", "/service/web", "").want(t, 204)
		consoleService(t, d, "web", "")
	},
}

func TestFollowEndsOrderlyWithTheRun(t *testing.T) {
	t.Parallel()
	for name, end := range consoleEnds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, "", nil)
			l := logsOpen(t, d, "/service/web/logs?follow=true")
			e.print("web", stdcopy.Stdout, "the last words")
			end(t, e, d)
			if err := l.end(t); err != nil || l.text.String() != "the last words" {
				t.Errorf("%v: %q", err, l.text)
			}
		})
	}
}

// Whatever else ends a follow is an error to the client, not the end of the run.
func TestFollowThatIsBrokenOffIsAnError(t *testing.T) {
	t.Parallel()
	sent := func(w http.ResponseWriter, text string) {
		io.WriteString(w, text)
		w.(http.Flusher).Flush()
	}
	for name, test := range map[string]struct {
		engine func(e *fakeEngine, d *daemon, w http.ResponseWriter)
		then   func(e *fakeEngine, d *daemon)
	}{
		"the daemon's end":   {then: func(e *fakeEngine, d *daemon) { d.stop() }},
		"the engine's end":   {then: func(e *fakeEngine, d *daemon) { e.close() }},
		"the engine ends it": {engine: func(e *fakeEngine, d *daemon, w http.ResponseWriter) {}},
		"the engine breaks it off": {engine: func(e *fakeEngine, d *daemon, w http.ResponseWriter) {
			panic(http.ErrAbortHandler)
		}},
		"a frame is no frame": {engine: func(e *fakeEngine, d *daemon, w http.ResponseWriter) {
			sent(w, "\x07\x00\x00\x00\x00\x00\x00\x01x")
		}},
		"the engine has an error in the stream": {engine: func(e *fakeEngine, d *daemon, w http.ResponseWriter) {
			sent(w, "\x03\x00\x00\x00\x00\x00\x00\x05wrong")
		}},
		"and cannot say whether it runs": {engine: func(e *fakeEngine, d *daemon, w http.ResponseWriter) {
			consoleHook(e, "/json", func(w http.ResponseWriter, r *http.Request) { reply(w, 500, "no") })
		}},
		"and hangs": {engine: func(e *fakeEngine, d *daemon, w http.ResponseWriter) {
			consoleHook(e, "/json", func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, `"tty":false`, engineImpatient)
			go_ := make(chan struct{})
			consoleHook(e, "/logs", func(w http.ResponseWriter, r *http.Request) {
				sent(w, "\x01\x00\x00\x00\x00\x00\x00\x05hello")
				select {
				case <-go_:
					test.engine(e, d, w)
				case <-r.Context().Done():
				}
			})
			l := logsOpen(t, d, "/service/web/logs?follow=true")
			l.wait(t, "hello")
			if test.engine != nil {
				close(go_)
			} else {
				test.then(e, d)
			}
			if err := l.end(t); !errors.Is(err, io.ErrUnexpectedEOF) || l.text.String() != "hello" {
				t.Errorf("ended with %v: %q", err, l.text)
			}
		})
	}
}

// What there is of an answer that breaks off is never taken for all of it.
func TestLogsThatTheEngineCutsOffAreAnError(t *testing.T) {
	t.Parallel()
	for name, engine := range map[string]func(w http.ResponseWriter){
		"in a frame, broken off": func(w http.ResponseWriter) {
			io.WriteString(w, "\x01\x00\x00\x00\x00\x00\x00\x09hel")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		},
		"in a frame, orderly":  func(w http.ResponseWriter) { io.WriteString(w, "\x01\x00\x00\x00\x00\x00\x00\x09hel") },
		"in a header, orderly": func(w http.ResponseWriter) { io.WriteString(w, "\x01\x00\x00\x00\x00\x00\x00\x01h\x01\x00") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, `"tty":false`, nil)
			consoleHook(e, "/logs", func(w http.ResponseWriter, r *http.Request) { engine(w) })
			if err := logsOpen(t, d, "/service/web/logs").end(t); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("ended with %v", err)
			}
		})
	}
}

func TestEngineThatRefusesLogs(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		status []int
		engine func(w http.ResponseWriter, r *http.Request)
	}{
		"dead": {[]int{409}, func(w http.ResponseWriter, r *http.Request) {
			reply(w, 409, "can not get logs from container which is dead or marked for removal")
		}},
		"driver": {[]int{502}, func(w http.ResponseWriter, r *http.Request) {
			reply(w, 500, "configured logging driver does not support reading")
		}},
		"hangs":   {[]int{504}, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }},
		"garbage": {[]int{502, 503}, func(w http.ResponseWriter, r *http.Request) { consoleRaw(w, "garbage\r\n\r\n") }},
		"hang-up": {[]int{502, 503}, func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, "", engineImpatient)
			consoleHook(e, "/logs", test.engine)
			for _, query := range []string{"", "?follow=true"} {
				a := d.do(t, "GET", "/service/web/logs"+query, "")
				if !slices.Contains(test.status, a.status) {
					t.Errorf("logs%s: answered %d %s, want %v", query, a.status, a.body, test.status)
				}
				errorsClean(t, d, a.body)
			}
		})
	}
}

// consoleRaw answers with a text instead of HTTP, and hangs up.
func consoleRaw(w http.ResponseWriter, text string) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	io.WriteString(conn, text)
}

func TestManyFollowersGetAllAndEachSlowOneIsDropped(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, `"tty":false`, func(c *config) { c.timeouts.clientWrite = 3 * time.Second })
	idle, err := net.Dial("tcp", strings.TrimPrefix(d.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	io.WriteString(idle, "GET /service/web/logs?follow=true HTTP/1.1\r\nHost: h\r\nX-Duxcore-CoreKey: "+d.key+"\r\n\r\n")
	const followers, size = 30, 64_000
	var sizes [followers]byteCount // of all: to keep that many bytes would slow them down
	ended := make(chan error, followers)
	for i := range followers {
		response, err := d.client.Do(d.request(t, "GET", "/service/web/logs?follow=true", nil))
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		go func() { // ends with the stream
			_, err := io.Copy(&sizes[i], response.Body)
			ended <- err
		}()
	}
	dropped := func() bool { return strings.Contains(d.log.String(), "remote="+idle.LocalAddr().String()) }
	printed := int64(0)
	for ; !dropped() || printed < 20; printed++ {
		e.print("web", stdcopy.Stdout, strings.Repeat("x", size))
		waitFor(t, "the text", func() bool { return sizes[0].Load() == (printed+1)*size })
	}
	d.do(t, "POST", "/service/web/ctl", `{"op":"stop"}`).want(t, 204)
	for range followers {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	for i := range followers {
		if got := sizes[i].Load(); got != printed*size {
			t.Errorf("follower %d has %d bytes, want %d", i, got, printed*size)
		}
	}
}

// byteCount counts what is written to it.
type byteCount struct{ atomic.Int64 }

func (n *byteCount) Write(p []byte) (int, error) {
	n.Add(int64(len(p)))
	return len(p), nil
}

// A request whose client leaves ends though the service prints nothing, whatever body it has.
func TestFollowEndsWhenItsClientLeaves(t *testing.T) {
	t.Parallel()
	for name, rest := range map[string]string{
		"no body":         "\r\n",
		"a body":          "Content-Length: 4\r\n\r\nbody",
		"a large body":    "Content-Length: 1000000\r\n\r\n" + strings.Repeat("x", 1_000_000),
		"a body to come":  "Content-Length: 4\r\n\r\n",
		"an open body":    "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
		"another request": "\r\nGET /health HTTP/1.1\r\nHost: h\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, "", func(c *config) { c.timeouts.clientWrite, c.timeouts.jsonBody = time.Second, time.Second })
			conn := wireDial(t, d)
			go io.WriteString(conn, "GET /service/web/logs?follow=true HTTP/1.1\r\nHost: h\r\nX-Duxcore-CoreKey: "+d.key+"\r\n"+rest)
			answered := make(chan error, 1)
			go func() {
				response, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err == nil && response.StatusCode != 200 && response.StatusCode != 413 {
					t.Errorf("status %d", response.StatusCode)
				}
				answered <- err
			}()
			select {
			case <-answered:
			case <-time.After(patience):
				t.Error("no answer has begun in", patience)
			}
			conn.Close()
			waitFor(t, "the end of the request", func() bool { return strings.Contains(d.log.String(), "/logs\"") })
			e.wantAnswered(t, "/logs")
		})
	}
}

// The answer to HEAD has no body, and the connection serves on.
func TestHeadOfLogsDoesNotHang(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", nil)
	e.print("web", stdcopy.Stdout, "text")
	for _, query := range []string{"", "?follow=true"} {
		conn := wireDial(t, d)
		fmt.Fprintf(conn, "HEAD /service/web/logs%s HTTP/1.1\r\nHost: h\r\nX-Duxcore-CoreKey: %s\r\n\r\n", query, d.key)
		reader := bufio.NewReader(conn)
		head := &http.Request{Method: "HEAD"}
		response, err := http.ReadResponse(reader, head)
		if err != nil || response.StatusCode != 200 {
			t.Fatalf("HEAD logs%s: %v %v", query, response, err)
		}
		fmt.Fprintf(conn, "GET /health HTTP/1.1\r\nHost: h\r\nX-Duxcore-CoreKey: %s\r\n\r\n", d.key)
		if response, err := http.ReadResponse(reader, nil); err != nil || response.StatusCode != 204 {
			t.Errorf("after HEAD logs%s the connection answers %v, %v", query, response, err)
		}
	}
}

func TestStdinIsAnsweredWhenAllHasArrived(t *testing.T) {
	t.Parallel()
	for _, tty := range []bool{true, false} {
		t.Run(fmt.Sprintf("tty %v", tty), func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, fmt.Sprintf(`"tty":%v`, tty), nil)
			e.setDeaf("web", true)
			sent := crowdSend(t, d, "POST", "/service/web/stdin", "one\n")
			waitFor(t, "the engine's call", func() bool { return len(consoleCalls(e, "/attach?")) == 1 })
			select {
			case a := <-sent:
				t.Fatalf("answered %d %s before the service has read", a.status, a.body)
			default:
			}
			e.setDeaf("web", false)
			(<-sent).want(t, 204)
			d.do(t, "POST", "/service/web/stdin", "two\n").want(t, 204) // it is still open
			calls := len(consoleCalls(e, "/attach?"))
			d.do(t, "POST", "/service/web/stdin", "").want(t, 204)
			if all := e.input("web"); all != "one\ntwo\n" || len(consoleCalls(e, "/attach?")) != calls {
				t.Errorf("the service has read %q", all)
			}
		})
	}
}

func TestStdinArrivesBeforeTheRequestEnds(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", nil)
	r, want := stdinOpen(t, d, "web"), ""
	for i := range 20 {
		text := fmt.Sprintf("command %d\n", i)
		io.WriteString(r, text)
		want += text
		waitFor(t, text, func() bool { all := e.input("web"); return all == want })
	}
	r.Close()
	r.answer(t).want(t, 204)
	if attached := len(consoleCalls(e, "/attach?")); attached != 20 {
		t.Errorf("%d attaches for 20 parts", attached)
	}
}

// consoleBytes are hard on a tty: each byte at a chunk's end, the keys that detach, and
// what looks like the daemon's own.
func consoleBytes() (chunks []string) {
	random := mathrand.NewChaCha8([32]byte{1})
	step := 1
	if testing.Short() || raceDetector() {
		step = 17 // of which the last is 0xff; another test goes through all ends without an engine
	}
	for end := 0; end < 256; end += step {
		chunk := make([]byte, random.Uint64()%3000)
		random.Read(chunk)
		chunks = append(chunks, string(chunk)+string([]byte{byte(end)}), string([]byte{byte(end)}))
		for _, before := range "\x10\x11\xfe\xff" {
			chunks = append(chunks, string([]byte{byte(before), byte(end)}))
		}
	}
	return append(chunks, "\x10\x11", "a\x10", "\x11b", strings.Repeat("\x10\x11", 5000), strings.Repeat("\x10", 9), "\x10", "\x10\x10\x11\x11",
		strings.Repeat("\xff", 70_000), strings.Repeat("\xfe", 70_000), strings.Repeat("\xff\xfe", 40_000), strings.Repeat("\xfe\xff", 40_000),
		"\xff\xfe", "\xfe\xff", "\xff\xff\xfe", "\xfe\xfe\xff", strings.Repeat("\xff\xfe", 4), strings.Repeat("\xfe\xff", 4),
		"\x00", strings.Repeat("\x00", 65536), strings.Repeat("\x04", 4096), strings.Repeat("line\r\n", 20_000))
}

func TestEveryByteArrives(t *testing.T) {
	t.Parallel()
	for _, tty := range []bool{true, false} {
		t.Run(fmt.Sprintf("tty %v", tty), func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, fmt.Sprintf(`"tty":%v`, tty), nil)
			for _, chunk := range consoleBytes() {
				d.do(t, "POST", "/service/web/stdin", chunk).want(t, 204)
				if read := e.takeInput("web"); read != chunk {
					t.Fatalf("the service has read %d bytes, ending with %q, of %d, ending with %q", len(read),
						consoleTail(read), len(chunk), consoleTail(chunk))
				}
			}
		})
	}
}

func consoleTail(text string) string { return text[max(0, len(text)-20):] }

// The engine may keep back what a chunk ends with, if the keys that detach begin so.
func TestKeysThatDetachDoNotBeginAsAChunkEnds(t *testing.T) {
	t.Parallel()
	for first := range 256 {
		for last := range 256 {
			chunk := []byte{byte(first), byte(last)}
			escape := escapeKeys{keys: parseKeys(detachKeys(chunk))}
			if passed, detached := escape.pass(chunk); detached || !bytes.Equal(passed, chunk) {
				t.Fatalf("of %q the engine passes on %q", chunk, passed)
			}
		}
	}
}

func TestTenMegabytesOfStdin(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, `"tty":false`, nil)
	text := make([]byte, 10<<20)
	mathrand.NewChaCha8([32]byte{2}).Read(text)
	d.do(t, "POST", "/service/web/stdin", string(text)).want(t, 204)
	if all := e.input("web"); all != string(text) {
		t.Errorf("%d bytes arrived otherwise", len(all))
	}
}

// consoleRecord is text that tells whose it is: a header, and bytes made from that.
func consoleRecord(writer, number, size int) string {
	record := make([]byte, 12+size)
	binary.BigEndian.PutUint32(record, uint32(writer))
	binary.BigEndian.PutUint32(record[4:], uint32(number))
	binary.BigEndian.PutUint32(record[8:], uint32(size))
	for i := range size {
		record[12+i] = byte(writer*31 + number*7 + i)
	}
	return string(record)
}

// consoleRecords takes records apart, and fails unless they are whole and in each
// writer's order. It returns how many there are.
func consoleRecords(t *testing.T, text string) (records int) {
	t.Helper()
	next := map[int]int{}
	for ; len(text) >= 12; records++ {
		header := []byte(text[:12])
		writer, number, size := int(binary.BigEndian.Uint32(header)), int(binary.BigEndian.Uint32(header[4:])), int(binary.BigEndian.Uint32(header[8:]))
		if size > len(text)-12 || number != next[writer] || text[:12+size] != consoleRecord(writer, number, size) {
			t.Fatalf("record %d is torn or out of order: writer %d, number %d (want %d), %d bytes", records, writer, number, next[writer], size)
		}
		next[writer]++
		text = text[12+size:]
	}
	if text != "" {
		t.Fatalf("%d bytes are left", len(text))
	}
	return records
}

func TestWritersNeverTearEachOthersChunks(t *testing.T) {
	t.Parallel()
	for _, writers := range []int{2, 10} {
		for size, each := range map[int]int{1: 20, 500: 20, 60_000: 5} {
			t.Run(fmt.Sprintf("%d writers of %d bytes", writers, size), func(t *testing.T) {
				t.Parallel()
				e, d := consoleStart(t, "", nil)
				var all sync.WaitGroup
				for writer := range writers {
					all.Go(func() {
						for number := range each { // each a request, and so at least a chunk
							d.do(t, "POST", "/service/web/stdin", consoleRecord(writer, number, size)).want(t, 204)
						}
					})
				}
				all.Wait()
				got := e.input("web")
				if size < 4000 { // comes in one piece from the network
					if records := consoleRecords(t, got); records != writers*each {
						t.Errorf("%d records, want %d", records, writers*each)
					}
				}
				consoleWhole(t, e, writers*each*(size+12))
			})
		}
	}
}

// consoleWhole fails unless all has arrived, and what came through an attach in one piece.
func consoleWhole(t *testing.T, e *fakeEngine, want int) {
	t.Helper()
	c, _ := e.container("web")
	seen, now, got := map[int]bool{}, 0, 0
	for _, in := range c.stdin {
		if in.attach != now && seen[in.attach] {
			t.Fatalf("the chunk of attach %d is torn", in.attach)
		}
		now, seen[in.attach] = in.attach, true
		got += len(in.text)
	}
	if got != want {
		t.Errorf("%d bytes, want %d", got, want)
	}
}

func TestWritersWithOpenRequestsKeepTheirOrder(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", nil)
	var all sync.WaitGroup
	for writer := range 10 {
		r := stdinOpen(t, d, "web")
		all.Go(func() {
			for number := range 30 {
				if _, err := io.WriteString(r, consoleRecord(writer, number, 20)); err != nil {
					t.Error(err)
				}
				waitFor(t, "the record", func() bool {
					all := e.input("web")
					return strings.Contains(all, consoleRecord(writer, number, 20))
				})
			}
			r.Close()
			r.answer(t).want(t, 204)
		})
	}
	all.Wait()
	got := e.input("web")
	if records := consoleRecords(t, got); records != 300 {
		t.Errorf("%d records", records)
	}
	consoleWhole(t, e, 300*32)
}

// Who writes much leaves room between its chunks for who writes little.
func TestLargeWriterDoesNotKeepOthersOut(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", nil)
	large := stdinOpen(t, d, "web")
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { // ends with stop
		defer close(stopped)
		for chunk := make([]byte, 64<<10); ; {
			select {
			case <-stop:
				return
			default:
				large.Write(chunk)
			}
		}
	}()
	for range 20 {
		before := len(consoleCalls(e, "/attach?"))
		d.do(t, "POST", "/service/web/stdin", "x").want(t, 204)
		if between := len(consoleCalls(e, "/attach?")) - before; between > 100 { // those before it came are among them
			t.Errorf("%d chunks of another's went ahead of one", between)
		}
	}
	close(stop)
	<-stopped
	large.Close()
	large.answer(t).want(t, 204)
}

func TestStdinOfAServiceThatHasNone(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	for _, body := range []string{"", "text"} {
		d.do(t, "POST", "/service/web/stdin", body).want(t, 409, "does not run")
	}
	d.do(t, "POST", "/service/nobody/stdin", "text").want(t, 404)
	consoleService(t, d, "shut", `"open_stdin":false`)
	for _, body := range []string{"", "text"} {
		d.do(t, "POST", "/service/shut/stdin", body).want(t, 409, "stdin")
	}
	if attached := consoleCalls(e, "/attach"); len(attached) > 0 {
		t.Errorf("the engine was asked %q", attached)
	}
}

// A chunk is for the run that the request began in, and no other.
func TestStdinOfAServiceThatStopsInTheMiddle(t *testing.T) {
	t.Parallel()
	for name, end := range consoleEnds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, "", nil)
			r := stdinOpen(t, d, "web")
			io.WriteString(r, "first")
			waitFor(t, "the first part", func() bool { all := e.input("web"); return all == "first" })
			end(t, e, d)
			io.WriteString(r, "second")
			if a := r.answer(t); a.status != 409 && !(a.status == 404 && strings.HasPrefix(name, "delete")) {
				t.Errorf("answered %d %s", a.status, a.body)
			} else {
				a.want(t, a.status)
			}
			if all := e.input("web"); strings.Contains(all, "second") {
				t.Errorf("%q arrived in another run", all)
			}
		})
	}
}

// What the engine has taken but the service has not is not written.
func TestStdinOfAServiceThatStopsWithinAChunk(t *testing.T) {
	t.Parallel()
	for name, end := range consoleEnds {
		for _, size := range []int{5, stdinChunk, 1 << 20} {
			t.Run(fmt.Sprintf("%s, %d bytes", name, size), func(t *testing.T) {
				t.Parallel()
				e, d := consoleStart(t, "", nil)
				e.setDeaf("web", true)
				sent := crowdSend(t, d, "POST", "/service/web/stdin", strings.Repeat("x", size))
				e.wantAttached(t) // the engine has a piece, which the service does not take
				end(t, e, d)
				if a := <-sent; a.status != 409 && !(a.status == 404 && strings.HasPrefix(name, "delete")) {
					t.Errorf("answered %d %s", a.status, a.body)
				}
			})
		}
	}
}

// Of a connection with more than 32 KiB that a service never reads, the engine keeps a socket for ever.
func TestEachConnectionForStdinGetsAtMost32KiB(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", nil)
	d.do(t, "POST", "/service/web/stdin", strings.Repeat("x", 1<<20)).want(t, 204)
	c, _ := e.container("web")
	sizes := map[int]int{}
	for _, in := range c.stdin {
		sizes[in.attach] += len(in.text)
	}
	for attach, size := range sizes {
		if size > 32<<10 {
			t.Errorf("connection %d got %d bytes", attach, size)
		}
	}
}

func TestServiceThatDoesNotReadIsAGatewayTimeout(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", func(c *config) { c.timeouts.clientWrite = time.Second })
	consoleService(t, d, "other", "")
	e.setDeaf("web", true)
	var waiting []<-chan answer
	for range 3 {
		waiting = append(waiting, crowdSend(t, d, "POST", "/service/web/stdin", strings.Repeat("x", 1<<20)))
	}
	for n := 0; len(waiting) > 0; n++ {
		d.do(t, "POST", "/service/other/stdin", "x").want(t, 204)
		select {
		case a := <-waiting[0]:
			a.want(t, 504)
			waiting = waiting[1:]
		case <-time.After(20 * time.Millisecond):
		}
	}
	e.setDeaf("web", false)
	d.do(t, "POST", "/service/web/stdin", "again").want(t, 204)
	// What the engine had taken before the 504 the service may get behind it.
	if all := e.input("web"); !strings.Contains(all, "again") {
		t.Errorf("the service has read %q", consoleTail(all))
	}
}

func TestStdinWhoseClientLeaves(t *testing.T) {
	t.Parallel()
	for name, head := range map[string]string{"length": "Content-Length: 100\r\n\r\nhello", "chunked": "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, "", nil)
			conn := wireDial(t, d)
			io.WriteString(conn, "POST /service/web/stdin HTTP/1.1\r\nHost: h\r\nX-Duxcore-CoreKey: "+d.key+"\r\n"+head)
			waitFor(t, "the part", func() bool { all := e.input("web"); return all == "hello" })
			conn.Close()
			waitFor(t, "the end of the request", func() bool { return strings.Contains(d.log.String(), "/stdin\"") })
			e.wantAnswered(t, "/attach")
			d.do(t, "POST", "/service/web/stdin", "!").want(t, 204)
			if all := e.input("web"); all != "hello!" {
				t.Errorf("the service has read %q", all)
			}
		})
	}
}

func TestEngineThatRefusesToAttach(t *testing.T) {
	t.Parallel()
	const upgraded = "HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
	for name, test := range map[string]struct {
		status []int
		engine func(w http.ResponseWriter, r *http.Request)
	}{
		"paused": {[]int{409}, func(w http.ResponseWriter, r *http.Request) {
			reply(w, 409, "Container web is paused, unpause the container before attach.")
		}},
		"gone":    {[]int{404, 409}, func(w http.ResponseWriter, r *http.Request) { reply(w, 404, "No such container: web") }},
		"error":   {[]int{502}, func(w http.ResponseWriter, r *http.Request) { reply(w, 500, "no") }},
		"no JSON": {[]int{502}, func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no", 500) }},
		"garbage": {[]int{502}, func(w http.ResponseWriter, r *http.Request) { consoleRaw(w, "garbage\r\n\r\n") }},
		"hang-up": {[]int{502, 503}, func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }},
		"200":     {[]int{502}, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello") }},
		"hangs":   {[]int{504}, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }},
		"hangs in the header": {[]int{504}, func(w http.ResponseWriter, r *http.Request) {
			conn, _, _ := w.(http.Hijacker).Hijack()
			io.WriteString(conn, upgraded[:40])
			io.Copy(io.Discard, conn)
			conn.Close()
		}},
		"hangs up once attached": {[]int{409, 502, 503}, func(w http.ResponseWriter, r *http.Request) { consoleRaw(w, upgraded) }},
		"hangs once attached": {[]int{504}, func(w http.ResponseWriter, r *http.Request) {
			conn, _, _ := w.(http.Hijacker).Hijack()
			io.WriteString(conn, upgraded)
			io.Copy(io.Discard, conn)            // to CloseWrite
			conn.Read(make([]byte, 1))           // at once
			for err := error(nil); err == nil; { // until the daemon has left
				time.Sleep(10 * time.Millisecond) // only a write tells, and the daemon reads all of them
				_, err = conn.Write([]byte("x"))
			}
			conn.Close()
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, "", func(c *config) { engineImpatient(c); c.timeouts.clientWrite = time.Second })
			over := consoleHook(e, "/attach", test.engine)
			a := d.do(t, "POST", "/service/web/stdin", strings.Repeat("x", 300_000))
			if !slices.Contains(test.status, a.status) {
				t.Errorf("answered %d %s, want %v", a.status, a.body, test.status)
			} else {
				a.want(t, a.status)
			}
			errorsClean(t, d, a.body)
			<-over // the daemon has let go of the connection
			e.setIntercept(nil)
			d.do(t, "POST", "/service/web/stdin", "x").want(t, 204)
		})
	}
}

func TestEngineThatHangsAtInspectForTheConsole(t *testing.T) {
	t.Parallel()
	for path, method := range map[string]string{"logs": "GET", "logs?follow=true": "GET", "stdin": "POST", "tty": "POST"} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, "", func(c *config) { engineImpatient(c); c.timeouts.clientWrite = time.Second })
			consoleHook(e, "/json", func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
			select {
			case a := <-crowdSend(t, d, method, "/service/web/"+path, map[bool]string{true: `{"rows":1,"cols":1}`}[method == "POST"]):
				a.want(t, 504)
			case <-time.After(patience):
				t.Error("no answer in", patience)
				e.setIntercept(nil)
				e.close()
			}
		})
	}
}

func TestDaemonEndsWhileStdinIsOpen(t *testing.T) {
	t.Parallel()
	for name, deaf := range map[string]bool{"the client is silent": false, "the service does not read": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, "", func(c *config) { c.timeouts.clientWrite = 25 * time.Second })
			e.setDeaf("web", deaf)
			r := stdinOpen(t, d, "web")
			io.WriteString(r, "text")
			waitFor(t, "the engine's call", func() bool {
				all := e.input("web")
				return all == "text" || deaf && len(consoleCalls(e, "/attach?")) > 0
			})
			stopped := make(chan error, 1)
			go func() { stopped <- d.stop() }()
			if a := r.answer(t); a.status != 503 && a.status != 0 {
				t.Errorf("answered %d %s", a.status, a.body)
			}
			if err := <-stopped; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSizeOfTheTTY(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", nil)
	for body, want := range map[string]string{`{"rows":24,"cols":80}`: "24x80", `{"cols":1,"rows":1}`: "1x1", `{"rows":65535,"cols":65535}`: "65535x65535"} {
		d.do(t, "POST", "/service/web/tty", body).want(t, 204)
		if c, _ := e.container("web"); c.tty != want {
			t.Errorf("%s set %s", body, c.tty)
		}
	}
	before := len(e.calls())
	for _, body := range []string{"", "{}", "null", "[]", `"24x80"`, `{"rows":24}`, `{"cols":80}`, `{"rows":0,"cols":80}`, `{"rows":24,"cols":0}`,
		`{"rows":-1,"cols":80}`, `{"rows":65536,"cols":80}`, `{"rows":24,"cols":65536}`, `{"rows":1.5,"cols":80}`, `{"rows":"24","cols":80}`,
		`{"rows":24,"cols":80,"x":1}`, `{"rows":24,"cols":null}`, `{"rows":[24],"cols":80}`, `{"rows":true,"cols":80}`, `{"rows":1e99,"cols":80}`,
		`{"rows":24,"cols":80}{}`, `{"rows":24,"cols":80`, `{"rows":18446744073709551640,"cols":80}`} {
		d.do(t, "POST", "/service/web/tty", body).want(t, 400)
	}
	e.wantAskedNothing(t, before)
}

func TestSizeOfATTYThatIsNotThere(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	const size = `{"rows":24,"cols":80}`
	d.do(t, "POST", "/service/web/tty", size).want(t, 409, "does not run")
	consoleService(t, d, "plain", `"tty":false`)
	d.do(t, "POST", "/service/plain/tty", size).want(t, 409, "tty")
	d.do(t, "POST", "/service/nobody/tty", size).want(t, 404)
	if calls := consoleCalls(e, "/resize"); len(calls) > 0 {
		t.Errorf("the engine was asked %q", calls)
	}
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
	for _, status := range []int{409, 404} { // it has stopped; a start has replaced it
		consoleHook(e, "/resize", func(w http.ResponseWriter, r *http.Request) { reply(w, status, "Container web is not there") })
		d.do(t, "POST", "/service/web/tty", size).want(t, 409)
	}
}

func TestConsoleReachesNoOtherContainer(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", nil)
	foreign := e.addForeign("theirs", map[string]string{labelService: "theirs"})
	e.print("theirs", stdcopy.Stdout, "secret")
	other := e.addForeign("plain", nil)
	web, _ := e.container("web")
	for _, id := range []string{"theirs", "plain", foreign[:12], foreign[:63], other[:2], web.ID[:12], web.ID[:63], web.ID, "we", "webs", "Web"} {
		for path, method := range map[string]string{"logs": "GET", "logs?follow=true": "GET", "stdin": "POST", "tty": "POST"} {
			body := map[bool]string{true: `{"rows":24,"cols":80}`}[method == "POST"]
			a := d.do(t, method, "/service/"+id+"/"+path, body)
			if a.status != 404 || strings.Contains(a.body, "secret") {
				t.Errorf("%s /service/%s/%s: %d %s", method, id, path, a.status, a.body)
			}
		}
	}
	for _, action := range []string{"/logs", "/attach", "/resize"} {
		if calls := consoleCalls(e, action); len(calls) > 0 {
			t.Errorf("the engine was asked %q", calls)
		}
	}
	// A service whose id begins the id of another's container is reached by its own.
	prefix := foreign[:10]
	consoleService(t, d, prefix, "")
	e.print(prefix, stdcopy.Stdout, "mine")
	if a := d.do(t, "GET", "/service/"+prefix+"/logs", "").want(t, 200); a.body != "mine" {
		t.Errorf("logs of %s: %q", prefix, a.body)
	}
	d.do(t, "POST", "/service/"+prefix+"/stdin", "for me").want(t, 204)
	if all := e.input(prefix); all != "for me" {
		t.Errorf("it has read %q", all)
	}
	d.do(t, "POST", "/service/"+prefix+"/tty", `{"rows":24,"cols":80}`).want(t, 204)
	for _, name := range []string{"theirs", "plain", "web"} {
		if c, _ := e.container(name); len(c.stdin) > 0 || c.tty != "" {
			t.Errorf("%s was reached: %+v", name, c)
		}
	}
}
