package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

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
	if brief() {
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
	return append(chunks, "\x10\x11", "a\x10", "\x11b", strings.Repeat("\x10\x11", 5000),
		strings.Repeat("\x10", 9), "\x10", "\x10\x10\x11\x11",
		strings.Repeat("\xff", 70_000), strings.Repeat("\xfe", 70_000), strings.Repeat("\xff\xfe", 40_000),
		strings.Repeat("\xfe\xff", 40_000),
		"\xff\xfe", "\xfe\xff", "\xff\xff\xfe", "\xfe\xfe\xff", strings.Repeat("\xff\xfe", 4),
		strings.Repeat("\xfe\xff", 4),
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
		writer, number, size := int(binary.BigEndian.Uint32(header)), int(binary.BigEndian.Uint32(header[4:])),
			int(binary.BigEndian.Uint32(header[8:]))
		if size > len(text)-12 || number != next[writer] || text[:12+size] != consoleRecord(writer, number, size) {
			t.Fatalf("record %d is torn or out of order: writer %d, number %d (want %d), %d bytes", records, writer,
				number, next[writer], size)
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
		// those before it came are among them
		if between := len(consoleCalls(e, "/attach?")) - before; between > 100 {
			t.Errorf("%d chunks of another's went ahead of one", between)
		}
	}
	close(stop)
	<-stopped
	large.CloseWithError(errors.New("what is on its way would take long"))
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
	text := make([]byte, 1<<20)
	mathrand.NewChaCha8([32]byte{2}).Read(text)
	d.do(t, "POST", "/service/web/stdin", string(text)).want(t, 204)
	if all := e.input("web"); all != string(text) {
		t.Errorf("%d bytes arrived otherwise", len(all))
	}
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
	e, d := consoleStart(t, "", func(c *config) { c.timeouts.clientWrite = haste() })
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
	for name, head := range map[string]string{"length": "Content-Length: 100\r\n\r\nhello",
		"chunked": "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, "", nil)
			conn := wireDial(t, d)
			io.WriteString(conn, d.head("POST /service/web/stdin")+head)
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
	for name, test := range map[string]struct {
		status []int
		engine func(w http.ResponseWriter, r *http.Request)
	}{
		"paused": {[]int{409}, func(w http.ResponseWriter, r *http.Request) {
			reply(w, 409, "Container web is paused, unpause the container before attach.")
		}},
		"gone": {[]int{404, 409}, func(w http.ResponseWriter, r *http.Request) {
			reply(w, 404, "No such container: web")
		}},
		"error":   {[]int{502}, func(w http.ResponseWriter, r *http.Request) { reply(w, 500, "no") }},
		"no JSON": {[]int{502}, func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no", 500) }},
		"garbage": {[]int{503}, func(w http.ResponseWriter, r *http.Request) { consoleRaw(w, "garbage\r\n\r\n") }},
		"hang-up": {[]int{502, 503}, func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }},
		"200":     {[]int{502}, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello") }},
		"hangs":   {[]int{504}, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }},
		"hangs in the header": {[]int{504}, func(w http.ResponseWriter, r *http.Request) {
			conn, _, _ := w.(http.Hijacker).Hijack()
			io.WriteString(conn, consoleUpgraded[:40])
			io.Copy(io.Discard, conn)
			conn.Close()
		}},
		"hangs up once attached": {[]int{409, 502, 503}, func(w http.ResponseWriter, r *http.Request) {
			consoleRaw(w, consoleUpgraded)
		}},
		"hangs once attached": {[]int{504}, func(w http.ResponseWriter, r *http.Request) { consoleHang(w) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, d := consoleStart(t, "", func(c *config) { engineImpatient(c); c.timeouts.clientWrite = haste() })
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

// consoleUpgraded is how the engine begins its answer to an attach.
const consoleUpgraded = "HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\n" +
	"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n"

// consoleHang attaches, and does nothing more until the daemon has left.
func consoleHang(w http.ResponseWriter) {
	conn, _, _ := w.(http.Hijacker).Hijack()
	defer conn.Close()
	io.WriteString(conn, consoleUpgraded)
	io.Copy(io.Discard, conn) // to CloseWrite
	conn.Read(make([]byte, 1))
	for range time.Tick(10 * time.Millisecond) { // only a write tells, and the daemon reads all of them
		if _, err := conn.Write([]byte("x")); err != nil {
			return
		}
	}
}

func TestStdinOfAServiceThatStopsWhileTheEngineBeginsToAttach(t *testing.T) {
	t.Parallel()
	e, d := consoleStart(t, "", func(c *config) { c.timeouts.clientWrite = haste() })
	over := consoleHook(e, "/attach", func(w http.ResponseWriter, r *http.Request) {
		statsEnds["its process's end"](t, e, d)
		consoleHang(w)
	})
	d.do(t, "POST", "/service/web/stdin", "x").want(t, 409, `"not_running"`)
	<-over
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
