package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
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
	must(t, err)
	if response.StatusCode != 200 {
		text, _ := io.ReadAll(response.Body)
		t.Fatalf("status %d: %s", response.StatusCode, text)
	}
	leave := sync.OnceFunc(func() { response.Body.Close() })
	l := logStream{response.Header, &syncBuffer{}, make(chan error, 1), leave}
	t.Cleanup(l.leave)
	go func() { // ends with the stream, or when the test leaves it
		_, err := io.Copy(l.text, response.Body)
		l.ended <- err
	}()
	return l
}

func (l logStream) wait(t testing.TB, text string) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%.40q in the logs", text), func() bool {
		return strings.Contains(l.text.String(), text)
	})
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
	"tale=1": "tale", "Follow=true": "Follow", "stream=true": "stream", "details=1": "details",
	"%20tail=1": "tail", "=1": "", "&&x": "x", "follow": "follow", "follow=": "follow", "follow=maybe": "follow",
	"follow=2": "follow", "follow=true,true": "follow", "follow=true%00": "follow",
	"follow=true&follow=true": "follow", "follow=true&follow=false": "follow", "follow=true&follow=": "follow",
	"timestamps=yes": "timestamps", "stdout=-1": "stdout", "stderr=%0atrue": "stderr",
	"stderr=true%0a": "stderr", "stdout=0&stdout=1": "stdout", "tail=": "tail", "tail=-1": "tail",
	"tail=1.5": "tail", "tail=1e3": "tail", "tail=+1": "tail", "tail=ALL": "tail", "tail=all%0a": "tail",
	"tail=0x10": "tail", "tail=1&tail=1": "tail", "tail=all&tail=all": "tail",
	"tail=99999999999999999999": "tail", "tail=%D9%A3": "tail", "tail=1%26follow=true": "tail",
	"since=": "since", "since=-1": "since", "since=1e9": "since", "since=10m": "since",
	"since=2022-05-08": "since", "since=.5": "since", "since=1.": "since", "since=1.1234567890": "since",
	"follow=1&until=1": "until",
	"since=NaN":        "since", "since=1&since=2": "since", "until=1,5": "until", "until=99999999999": "until",
	"until=%2B1": "until", "since=2022-05-08T19:50:43": "since", "since=2022-13-08T19:50:43Z": "since",
	"until=2022-02-30T19:50:43Z": "until", "until=2022-05-08T24:00:00Z": "until",
	"since=2022-05-08t19:50:43z": "since", "since=2022-05-08T19:50:43+02:00": "since",
	"since=2022-05-08T19:50:43%2B0200": "since", "since=2022-05-08T19:50:43.0000000001Z": "since",
	"since=2022-05-08T19:50:43.Z": "since", "until=2022-05-08T19:50:43,5Z": "until",
	"since=2022-05-08T19:50:43Z&since=1": "since", "until=2022-05-08T:::::::::Z": "until",
	"since=2022-05-08T19:50:43%2B99:99": "since", "until=1%20": "until",
	"tail=1;follow=true": "query", ";": "query", "tail=%zz": "query", "%": "query", "follow=true&%f": "query",
	"tail=1&since=%": "query",
}

func TestBadLogsQueriesAreNamedAndReachNothing(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", nil)
	before := len(e.calls())
	for query, named := range badLogsQueries {
		a, _ := sendRaw(t, d, d.head("GET /service/web/logs?"+query)+"\r\n")
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
		"and somebody has renamed the container": {engine: func(e *fakeEngine, d *daemon, w http.ResponseWriter) {
			e.rename("web", "other")
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
		"in a frame, orderly": func(w http.ResponseWriter) {
			io.WriteString(w, "\x01\x00\x00\x00\x00\x00\x00\x09hel")
		},
		"in a header, orderly": func(w http.ResponseWriter) {
			io.WriteString(w, "\x01\x00\x00\x00\x00\x00\x00\x01h\x01\x00")
		},
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
		"hangs": {[]int{504}, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }},
		"garbage": {[]int{502, 503}, func(w http.ResponseWriter, r *http.Request) {
			consoleRaw(w, "garbage\r\n\r\n")
		}},
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

func TestManyFollowersGetAllAndEachSlowOneIsDropped(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, `"tty":false`, func(c *config) { c.timeouts.clientWrite = haste() })
	idle := wireDial(t, d)
	io.WriteString(idle, d.head("GET /service/web/logs?follow=true")+"\r\n")
	const followers, size = 30, 64_000
	var sizes [followers]byteCount // of all: to keep that many bytes would slow them down
	ended := make(chan error, followers)
	for i := range followers {
		response, err := d.client.Do(d.request(t, "GET", "/service/web/logs?follow=true", nil))
		must(t, err)
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
			e, d := consoleStart(t, "", func(c *config) {
				c.timeouts.clientWrite, c.timeouts.jsonBody = haste(), haste()
			})
			conn := wireDial(t, d)
			go io.WriteString(conn, d.head("GET /service/web/logs?follow=true")+rest)
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
		io.WriteString(conn, d.head("HEAD /service/web/logs"+query)+"\r\n")
		reader := bufio.NewReader(conn)
		head := &http.Request{Method: "HEAD"}
		response, err := http.ReadResponse(reader, head)
		if err != nil || response.StatusCode != 200 {
			t.Fatalf("HEAD logs%s: %v %v", query, response, err)
		}
		io.WriteString(conn, d.head("GET /health")+"\r\n")
		if response, err := http.ReadResponse(reader, nil); err != nil || response.StatusCode != 204 {
			t.Errorf("after HEAD logs%s the connection answers %v, %v", query, response, err)
		}
	}
}

// The deadline of the last write has passed when a service ends that has long been quiet.
func TestFollowEndsOrderlyAfterALongQuiet(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", func(c *config) { c.timeouts.clientWrite = haste() / 4 })
	l := logsOpen(t, d, "/service/web/logs?follow=true")
	e.print("web", stdcopy.Stdout, "the last words")
	time.Sleep(haste() / 2) // until the deadline of that write has passed, which nothing shows
	d.do(t, "POST", "/service/web/ctl", `{"op":"stop"}`).want(t, 204)
	if err := l.end(t); err != nil || l.text.String() != "the last words" {
		t.Errorf("%v: %q", err, l.text)
	}
}
