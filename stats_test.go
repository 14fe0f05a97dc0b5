package main

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// statsStream is a stream of statistics that a test reads line by line.
type statsStream struct {
	header http.Header
	lines  <-chan string // closed at the stream's end
	leave  func()
}

func (s statsStream) next(t testing.TB) string {
	t.Helper()
	select {
	case line, ok := <-s.lines:
		if !ok {
			t.Fatal("the stream has ended")
		}
		return line
	case <-time.After(patience):
		t.Fatal("no line in", patience)
	}
	return ""
}

// rest returns what comes until the stream ends.
func (s statsStream) rest(t testing.TB) (lines []string) {
	t.Helper()
	for limit := time.After(patience); ; {
		select {
		case line, ok := <-s.lines:
			if !ok {
				return lines
			}
			lines = append(lines, line)
		case <-limit:
			t.Fatal("the stream did not end in", patience)
		}
	}
}

// statsCalls returns how often the engine was asked for statistics, and how often at all.
func statsCalls(e *fakeEngine) (stats, all int) {
	for _, call := range e.calls() {
		if all++; strings.Contains(call, "/stats?") {
			stats++
		}
	}
	return stats, all
}

// statsFrames has the engine's streams send what comes on frames, and reports on ended
// when one is over.
func statsFrames(e *fakeEngine, frames <-chan string) (ended <-chan struct{}) {
	over := make(chan struct{}, 100)
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Query().Get("stream") != "1" {
			return false
		}
		defer func() { over <- struct{}{} }()
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		for {
			select {
			case frame, ok := <-frames:
				if !ok {
					return true
				}
				io.WriteString(w, frame+"\n")
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return true
			}
		}
	})
	return over
}

// sample returns a complete frame, without its line feed.
func sample(n int) string {
	return fmt.Sprintf(`{ "read":"2022-05-08T19:50:43.024725738Z",  `+
		`"preread":"2022-05-08T19:50:42.020410692Z","n":%d, "x":1e2,"é":"\u0001\u2028<&" }`, n)
}

func TestHundredWatchersCostOneEngineStream(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, nil)
	var watchers sync.WaitGroup
	for i := range 100 {
		watchers.Go(func() {
			if i%2 == 0 {
				d.do(t, "GET", "/service/web/stats", "").want(t, 200, `"/web"`)
				return
			}
			stream := statsOpen(t, d, "web")
			defer stream.leave()
			for range 5 {
				if line := stream.next(t); strings.Contains(line, zeroTime) {
					t.Errorf("a frame without both samples: %s", line)
				}
			}
		})
	}
	watchers.Wait()
	if stats, _ := statsCalls(e); stats != 1 {
		t.Errorf("the engine was asked for %d streams", stats)
	}
}

func TestWarmStatsAskTheEngineNothing(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, nil)
	d.do(t, "GET", "/service/web/stats", "").want(t, 200)
	_, before := statsCalls(e)
	for range 20 {
		d.do(t, "GET", "/service/web/stats", "").want(t, 200)
	}
	if _, after := statsCalls(e); after != before {
		t.Errorf("the engine was asked %q", e.calls()[before:])
	}
}

// The engine's bytes are passed on one by one, each as it comes, except those of the
// frame that has no earlier sample.
func TestStatsAreTheEnginesBytes(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, nil)
	frames := make(chan string)
	statsFrames(e, frames)
	plain := crowdSend(t, d, "GET", "/service/web/stats", "")
	frames <- `{"read":"2022-05-08T19:50:41Z","preread":"` + zeroTime + `"}`
	frames <- sample(0)
	a := (<-plain).want(t, 200)
	if want := sample(0) + "\n"; a.body != want || a.header.Get("Content-Type") != "application/json" {
		t.Errorf("got %s %s, want %s", a.header.Get("Content-Type"), a.body, want)
	}
	stream := statsOpen(t, d, "web")
	if got := stream.header.Get("Content-Type"); got != "application/x-ndjson" {
		t.Errorf("Content-Type is %q", got)
	}
	for n := range 10 { // no frame is sent before the one ahead has arrived
		if n > 0 {
			frames <- sample(n)
		}
		if got, want := stream.next(t), sample(n)+"\n"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	close(frames)
}

func TestStatsOfAServiceThatDoesNotRunAreAskedFor(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	for _, path := range []string{"/service/web/stats", "/service/web/stats?stream=false",
		"/service/web/stats?stream=true"} {
		before, _ := statsCalls(e)
		d.do(t, "GET", path, "").want(t, 200, zeroTime)
		if after, _ := statsCalls(e); after != before+1 {
			t.Errorf("GET %s asked the engine %d times", path, after-before)
		}
	}
	d.do(t, "GET", "/service/nobody/stats", "").want(t, 404)
	d.do(t, "GET", "/service/nobody/stats?stream=true", "").want(t, 404)
}

// A service that starts and stops while the engine is asked gets an empty answer from the engine.
func TestStatsAreNeverAnEmptyAnswer(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	var empty atomic.Int64
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		return strings.HasSuffix(r.URL.Path, "/stats") && empty.Add(-1) >= 0
	})
	for _, path := range []string{"/service/web/stats", "/service/web/stats?stream=true"} {
		empty.Store(3)
		d.do(t, "GET", path, "").want(t, 200, zeroTime, "/web")
		empty.Store(1000)
		d.do(t, "GET", path, "").want(t, 502, "no statistics")
	}
}

func TestWatcherThatDoesNotReadIsDroppedAndSlowsNobody(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, func(c *config) { c.timeouts.clientWrite = haste() / 4 })
	frames, done := make(chan string), make(chan struct{})
	statsFrames(e, frames)
	// Large ones, or the kernel's buffers hold an hour of them.
	frame := `{"read":"2022-05-08T19:50:43Z","preread":"2022-05-08T19:50:42Z","x":"` +
		strings.Repeat("x", maxFrame-1000) + `"}`
	go func() {
		for {
			select {
			case frames <- frame:
			case <-done:
				return
			}
		}
	}()
	defer close(done)
	idle := wireDial(t, d)
	io.WriteString(idle, d.head("GET /service/web/stats?stream=true")+"\r\n")
	stream := statsOpen(t, d, "web")
	dropped := func() bool { return strings.Contains(d.log.String(), "remote="+idle.LocalAddr().String()) }
	for !dropped() {
		stream.next(t)
	}
	for range 10 {
		stream.next(t)
	}
	if streams, _ := statsCalls(e); streams != 1 {
		t.Errorf("the engine was asked for %d streams", streams)
	}
}

func TestStreamEndsWithItsService(t *testing.T) {
	t.Parallel()
	for name, end := range statsEnds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, d := startWithRunning(t, nil)
			stream := statsOpen(t, d, "web")
			stream.next(t)
			end(t, e, d)
			for _, line := range stream.rest(t) {
				if strings.Contains(line, zeroTime) {
					t.Errorf("a frame without both samples: %s", line)
				}
			}
		})
	}
}

// As one of logs does.
func TestStreamOfADeletedServiceEndsOrderly(t *testing.T) {
	t.Parallel()
	_, d := startWithRunning(t, nil)
	response, err := d.client.Do(d.request(t, "GET", "/service/web/stats?stream=true", nil))
	must(t, err)
	defer response.Body.Close()
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	if _, err := io.ReadAll(response.Body); err != nil {
		t.Errorf("the stream ended with %v", err)
	}
}

// Once a restart is acknowledged there is nothing to be seen of the earlier container.
func TestStatsAreNeverThoseOfAnEarlierContainer(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, nil)
	for i := range 10 {
		earlier, _ := e.container("web")
		stream := statsOpen(t, d, "web")
		if line := stream.next(t); !strings.Contains(line, earlier.ID) {
			t.Fatalf("not of %s: %s", earlier.ID, line)
		}
		d.do(t, "PATCH", "/service/web/env", fmt.Sprintf(`{"A":"%d"}`, i)).want(t, 204)
		d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
		now, _ := e.container("web")
		for range 3 {
			if a := d.do(t, "GET", "/service/web/stats", "").want(t, 200, now.ID); strings.Contains(a.body, zeroTime) {
				t.Errorf("statistics of a running service without both samples: %s", a.body)
			}
		}
		// It ends, or goes on with the new container, and never goes back.
		moved := false
		for range 20 {
			line, ok := <-stream.lines
			if !ok {
				break
			}
			if moved = moved || strings.Contains(line, now.ID); moved && !strings.Contains(line, now.ID) {
				t.Errorf("after the restart: %s", line)
			}
		}
		stream.leave()
	}
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	d.do(t, "GET", "/service/web/stats", "").want(t, 404)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	d.do(t, "POST", "/service/web/ctl", `{"op":"start"}`).want(t, 204)
	now, _ := e.container("web")
	d.do(t, "GET", "/service/web/stats", "").want(t, 200, now.ID)
}

// The feed has had its newest frame a moment ago, and its engine has yet to notice the kill.
func TestKillForgetsTheStatsOfWhatRan(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, nil)
	frames := make(chan string)
	ended := statsFrames(e, frames)
	running := crowdSend(t, d, "GET", "/service/web/stats", "")
	frames <- sample(1)
	(<-running).want(t, 200, `"n":1`)
	d.do(t, "POST", "/service/web/ctl", `{"op":"kill"}`).want(t, 204)
	d.do(t, "GET", "/service/web/stats", "").want(t, 200, zeroTime)
	<-ended
}

// An engine with many watched services needs longer for one round of frames than a request waits.
func TestFeedOutlivesRequestsThatTimeOut(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, func(c *config) { c.timeouts.engineRead = haste() })
	frames := make(chan string)
	statsFrames(e, frames)
	for _, path := range []string{"/service/web/stats", "/service/web/stats?stream=true"} {
		d.do(t, "GET", path, "").want(t, 504)
	}
	asked := crowdSend(t, d, "GET", "/service/web/stats", "")
	frames <- sample(1)
	(<-asked).want(t, 200, `"n":1`)
	if streams, _ := statsCalls(e); streams != 1 {
		t.Errorf("the engine was asked for %d streams", streams)
	}
}

// Once a stream has begun, only the feed limits the wait for a frame.
func TestStreamWaitsForASlowEngine(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, func(c *config) { c.timeouts.engineRead = haste() })
	frames, pause := make(chan string), make(chan struct{})
	statsFrames(e, frames)
	go func() { // ends with pause
		for n := 1; ; n++ {
			select {
			case frames <- sample(n):
			case <-pause:
				return
			}
		}
	}()
	stream := statsOpen(t, d, "web")
	stream.next(t)
	close(pause)
	waitFor(t, "a request that times out", func() bool {
		select {
		case <-stream.lines:
		default:
		}
		return d.do(t, "GET", "/service/web/stats", "").status == 504
	})
	frames <- sample(-1)
	for !strings.Contains(stream.next(t), `"n":-1`) {
	}
	if streams, _ := statsCalls(e); streams != 1 {
		t.Errorf("the engine was asked for %d streams", streams)
	}
}

func TestFeedEndsWithoutAFrame(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, func(c *config) { c.timeouts.statsFrame = haste() / 4 })
	ended := statsFrames(e, nil)
	d.do(t, "GET", "/service/web/stats", "").want(t, 504, "no statistics")
	<-ended
	d.do(t, "GET", "/service/web/stats?stream=true", "").want(t, 504, "no statistics")
	<-ended
	e.setIntercept(nil)
	waitFor(t, "statistics", func() bool { return d.do(t, "GET", "/service/web/stats", "").status == 200 })
}

// A request that waits for a frame keeps the feed, however long the frame takes.
func TestFeedIsIdleIfNobodyHasAskedSinceTheFrameBefore(t *testing.T) {
	t.Parallel()
	ago := func(seconds int) time.Time { return time.Now().Add(-time.Duration(seconds) * time.Second) }
	for name, test := range map[string]struct {
		asked, newest time.Time
		want          bool
	}{
		"before the first frame":     {ago(100), time.Time{}, false},
		"long awaited":               {ago(100), ago(101), false},
		"asked for not long ago":     {ago(20), ago(1), false},
		"nobody has asked since":     {ago(40), ago(39), true},
		"nobody has asked for hours": {ago(9999), ago(1), true},
	} {
		f := newFeed(t.Context())
		f.asked.Store(&test.asked)
		f.newest.Load().arrived = test.newest
		if got := f.idle(30 * time.Second); got != test.want {
			t.Errorf("%s: idle is %v, want %v", name, got, test.want)
		}
	}
}

func TestFeedEndsWhenNobodyAsksAnyMore(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, func(c *config) { c.timeouts.statsIdle = haste() / 2 })
	for n := range 3 {
		stream := statsOpen(t, d, "web")
		d.do(t, "GET", "/service/web/stats", "").want(t, 200)
		stream.next(t)
		if stats, _ := statsCalls(e); stats != n+1 {
			t.Errorf("the engine was asked for %d streams, want %d", stats, n+1)
		}
		stream.leave()
		e.wantAnswered(t, "/stats")
	}
}

// An engine whose streams hold nothing of use is asked a limited number of times.
func TestEngineWithoutStatistics(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]func(http.ResponseWriter, *http.Request){
		"ends at once": func(w http.ResponseWriter, r *http.Request) {},
		"refuses":      func(w http.ResponseWriter, r *http.Request) { reply(w, 500, "no cgroup") },
		"waits":        func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"sends only a first frame": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, `{"read":"2022-05-08T19:50:41Z","preread":"`+zeroTime+`"}`+"\n")
		},
		"sends an endless line": func(w http.ResponseWriter, r *http.Request) { w.Write(make([]byte, 2*maxFrame)) },
		"ends within a frame": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, sample(0)[:100])
		},
		"breaks off within a frame": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, sample(0)[:100])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, d := startWithRunning(t, engineImpatient)
			_, before := statsCalls(e)
			e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, "/stats") {
					return false
				}
				answer(w, r)
				return true
			})
			for _, path := range []string{"/service/web/stats", "/service/web/stats?stream=true"} {
				if a := d.do(t, "GET", path, ""); a.status != 502 && a.status != 504 || strings.Contains(a.body, "EOF") {
					t.Errorf("GET %s: %d %s", path, a.status, a.body)
				}
			}
			if _, after := statsCalls(e); after > before+2*2*(1+statsRetries) {
				t.Errorf("the engine was asked %d times", after-before)
			}
			e.setIntercept(nil)
			waitFor(t, "statistics", func() bool { return d.do(t, "GET", "/service/web/stats", "").status == 200 })
		})
	}
}

// A service that is restarted before its first statistics is not a failure of the engine's.
func TestStatsWaitThroughManyRestarts(t *testing.T) {
	t.Parallel()
	e, d := startWithRunning(t, nil)
	begun := make(chan struct{}, 100)
	var speaks atomic.Bool
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case strings.HasSuffix(r.URL.Path, "/stop"): // it runs again before anybody looks
			w.WriteHeader(http.StatusNoContent)
			return true
		case strings.HasSuffix(r.URL.Path, "/stats") && !speaks.Load():
			begun <- struct{}{}
			<-r.Context().Done()
			return true
		}
		return false
	})
	asked := crowdSend(t, d, "GET", "/service/web/stats", "")
	for range statsRetries - 1 {
		waitFor(t, "a stream of the engine's", func() bool { return len(begun) > 0 })
		<-begun
		d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
	}
	speaks.Store(true)
	d.do(t, "POST", "/service/web/ctl", `{"op":"restart"}`).want(t, 204)
	(<-asked).want(t, 200, `"/web"`)
}
