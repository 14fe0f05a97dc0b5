package main

import (
	"bufio"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func wireDial(t testing.TB, d *daemon) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(d.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(time.Minute))
	return conn
}

// wireStatuses returns the status of each answer on conn until the daemon closes it.
func wireStatuses(t testing.TB, conn net.Conn) (statuses []int) {
	t.Helper()
	for reader := bufio.NewReader(conn); ; {
		response, err := http.ReadResponse(reader, nil)
		if err != nil {
			if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
				t.Errorf("the connection is still open after %v", statuses)
			}
			return statuses
		}
		io.Copy(io.Discard, response.Body)
		statuses = append(statuses, response.StatusCode)
	}
}

func wireStatus(t testing.TB, conn net.Conn) int {
	t.Helper()
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	return response.StatusCode
}

// CVE-2025-69199: a client that takes its time is sent away.
func TestSlowClientsAreDropped(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), func(c *config) { c.waits.json = 200 * time.Millisecond })
	key := "Host: h\r\nX-Duxcore-CoreKey: " + d.key + "\r\n"
	for name, test := range map[string]struct {
		begin string
		drip  string
		want  string // the answer begins with it
	}{
		"nothing":        {"", "", ""},
		"half a header":  {"GET /health HTTP/1.1\r\nHost: h\r\nX-A: ", "", ""},
		"slow header":    {"GET /health HTTP/1.1\r\nHost: h\r\nX-A: ", "a", ""},
		"no body":        {"POST /service HTTP/1.1\r\n" + key + "Content-Length: 100\r\n\r\n", "", "HTTP/1.1 400 "},
		"slow body":      {"POST /service HTTP/1.1\r\n" + key + "Content-Length: 100000\r\n\r\n", " ", "HTTP/1.1 400 "},
		"slow chunks":    {"PATCH /service/web/env HTTP/1.1\r\n" + key + "Transfer-Encoding: chunked\r\n\r\n", "1\r\n \r\n", "HTTP/1.1 400 "},
		"unwanted body":  {"GET /nowhere HTTP/1.1\r\n" + key + "Content-Length: 100\r\n\r\n", "", "HTTP/1.1 404 "},
		"slow, unwanted": {"DELETE /health HTTP/1.1\r\n" + key + "Content-Length: 100000\r\n\r\n", " ", "HTTP/1.1 405 "},
		"slow, no key":   {"POST /docker/image HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n", " ", "HTTP/1.1 401 "},
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
			if timeout, ok := err.(net.Error); ok && timeout.Timeout() || !strings.HasPrefix(string(answer), test.want) {
				t.Errorf("got %q, %v", answer, err)
			}
		})
	}
}

func TestHeadersAreBounded(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, newFakeEngine(t).host(), nil)
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
		a, closed := sendRaw(t, d, test.line+"\r\nHost: h\r\nX-Duxcore-CoreKey: "+d.key+"\r\n"+test.header+"\r\n\r\n")
		if a.status != test.status || closed != (test.status == 431) {
			t.Errorf("%.30q with %d bytes of header: status %d, closed %v", test.line, len(test.header), a.status, closed)
		}
	}
}

func TestBodyWithoutEndIsCutOff(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, newFakeEngine(t).host(), func(c *config) { c.maxImageBytes = 4 << 20 })
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
		conn := wireDial(t, d)
		fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: h\r\nX-Duxcore-CoreKey: %s\r\n%s\r\n", test.line, d.key, test.framing)
		piece := strings.Repeat(" ", 32<<10)
		if test.framing == chunked {
			piece = fmt.Sprintf("%x\r\n%s\r\n", len(piece), piece)
		}
		var sent error
		var sending sync.WaitGroup
		sending.Go(func() {
			for sent == nil {
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
	}
}

// Shapes that a proxy in front may take for another number of requests. What matters is
// that the last line, which is a request of its own for some, is never answered.
func TestSmugglingShapes(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, newFakeEngine(t).host(), nil)
	head := "POST /nowhere HTTP/1.1\r\nHost: h\r\nX-Duxcore-CoreKey: " + d.key + "\r\n"
	smuggled := "GET /health HTTP/1.1\r\nHost: h\r\nX-Duxcore-CoreKey: " + d.key + "\r\n\r\n"
	for name, test := range map[string]struct {
		text     string
		statuses []int // until the daemon closes the connection
	}{
		"two lengths":                    {head + "Content-Length: 0\r\nContent-Length: 44\r\n\r\n", []int{400}},
		"two lengths, the first larger":  {head + "Content-Length: 44\r\nContent-Length: 0\r\n\r\n", []int{400}},
		"a list of lengths":              {head + "Content-Length: 0, 44\r\n\r\n", []int{400}},
		"a list of equal lengths":        {head + "Content-Length: 0, 0\r\n\r\n", []int{400}},
		"signed length":                  {head + "Content-Length: +0\r\n\r\n", []int{400}},
		"negative length":                {head + "Content-Length: -1\r\n\r\n", []int{400}},
		"hexadecimal length":             {head + "Content-Length: 0x0\r\n\r\n", []int{400}},
		"empty length":                   {head + "Content-Length:\r\n\r\n", []int{400}},
		"huge length":                    {head + "Content-Length: 99999999999999999999\r\n\r\n", []int{400}},
		"length and chunked":             {head + "Content-Length: 44\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", []int{404}},
		"chunked and length":             {head + "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n0\r\n\r\n", []int{404}},
		"bad length and chunked":         {head + "Content-Length: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", []int{400}},
		"chunked twice":                  {head + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", []int{501}},
		"chunked in a list":              {head + "Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n", []int{501}},
		"chunked folded":                 {head + "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", []int{404}},
		"chunked, folded and more":       {head + "Transfer-Encoding: chunked\r\n , identity\r\n\r\n0\r\n\r\n", []int{501}},
		"xchunked":                       {head + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", []int{501}},
		"chunked with a vertical tab":    {head + "Transfer-Encoding: \vchunked\r\n\r\n0\r\n\r\n", []int{400}},
		"chunked with a NUL":             {head + "Transfer-Encoding: chunked\x00\r\n\r\n0\r\n\r\n", []int{400}},
		"identity":                       {head + "Transfer-Encoding: identity\r\n\r\n", []int{501}},
		"a space before the colon":       {head + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", []int{400}},
		"a space before the name":        {"POST /nowhere HTTP/1.1\r\n X: y\r\n" + head[len("POST /nowhere HTTP/1.1\r\n"):] + "\r\n", []int{400}},
		"a bare CR in a value":           {head + "X: a\rTransfer-Encoding: chunked\r\n\r\n", []int{400}},
		"a bare CR in a name":            {head + "X\rY: a\r\n\r\n", []int{400}},
		"a chunk size with a sign":       {head + "Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n", []int{404}},
		"a chunk size that overflows":    {head + "Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n\r\n", []int{404}},
		"a chunk with a bare LF":         {head + "Transfer-Encoding: chunked\r\n\r\n0\n\r\n", []int{404}},
		"a chunk extension with an LF":   {head + "Transfer-Encoding: chunked\r\n\r\n2;\nxx\r\n0\r\n\r\n", []int{404}},
		"a length in the trailer":        {head + "Transfer-Encoding: chunked\r\nTrailer: Content-Length\r\n\r\n0\r\nContent-Length: 5\r\n\r\n", []int{400}},
		"chunked in HTTP/1.0":            {strings.Replace(head, "1.1", "1.0", 1) + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", []int{404}},
		"length and chunked in HTTP/1.0": {strings.Replace(head, "1.1", "1.0", 1) + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", []int{404}},
		"two hosts":                      {head + "Host: other\r\n\r\n", []int{400}},
		"no host":                        {strings.Replace(head, "Host: h\r\n", "", 1) + "\r\n", []int{400}},
		"HTTP/2":                         {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", []int{401}},
		"an upgrade to HTTP/2":           {head + "Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", []int{404}},
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

// wireProcess starts the daemon, built as it is shipped, as a process of its own, and
// returns its process id.
func wireProcess(t testing.TB, engineHost string, args ...string) (*daemon, int) {
	t.Helper()
	program, err := shipped()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	d := &daemon{log: &syncBuffer{}, binds: filepath.Join(dir, "binds"), client: &http.Client{Transport: &http.Transport{}, Timeout: time.Minute}}
	process := exec.Command(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), program.Fd()), append(args, "-addr", "127.0.0.1:0", "-corekey", filepath.Join(dir, "corekey.bin"), "-binds", d.binds)...)
	process.Env, process.Stderr = append(os.Environ(), "DOCKER_HOST="+engineHost), d.log
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		process.Process.Signal(syscall.SIGTERM)
		if err := process.Wait(); err != nil {
			t.Errorf("the daemon ended with: %v\n%s", err, d.log)
		}
	})
	address := regexp.MustCompile(`msg=listening addr=(\S+)`)
	waitFor(t, "the daemon listens", func() bool { return address.MatchString(d.log.String()) })
	d.url = "http://" + address.FindStringSubmatch(d.log.String())[1]
	key, err := os.ReadFile(filepath.Join(dir, "corekey.bin"))
	if err != nil {
		t.Fatal(err)
	}
	d.key = base64.StdEncoding.EncodeToString(key)
	return d, process.Process.Pid
}

// shipped builds the daemon as it is shipped. The file has no name any more: it goes with
// the test's process, through whose descriptor it is executed.
var shipped = sync.OnceValues(func() (*os.File, error) {
	dir, err := os.MkdirTemp("", "shipped")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if output, err := exec.Command("packaging/build", dir+"/daemon").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("cannot build the daemon: %w\n%s", err, output)
	}
	return os.Open(dir + "/daemon")
})

// wireMemory returns what the process has in memory, and the most it ever had, in bytes.
func wireMemory(t testing.TB, pid int) (now, peak int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for field, value := range map[string]*int{"VmRSS": &now, "VmHWM": &peak} {
		found := regexp.MustCompile(field + `:\s+(\d+) kB`).FindSubmatch(status)
		if *value, err = strconv.Atoi(string(found[1])); err != nil {
			t.Fatal(err)
		}
		*value <<= 10
	}
	return now, peak
}

func TestGigabytesWithoutTheKey(t *testing.T) {
	t.Parallel()
	d, pid := wireProcess(t, newFakeEngine(t).host())
	before, _ := wireMemory(t, pid)
	var clients sync.WaitGroup
	var taken atomic.Int64
	const count = 50
	for i := range count {
		clients.Go(func() {
			conn := wireDial(t, d)
			defer conn.Close()
			framing := []string{"Content-Length: 1073741824\r\n", "Transfer-Encoding: chunked\r\n"}[i%2]
			fmt.Fprintf(conn, "POST /docker/image HTTP/1.1\r\nHost: h\r\n%s\r\n", framing)
			n, _ := io.CopyN(conn, wireChunks{}, 1<<30)
			taken.Add(n)
		})
	}
	for range 20 {
		d.do(t, "GET", "/health", "").want(t, 204)
	}
	clients.Wait()
	_, peak := wireMemory(t, pid)
	t.Logf("%d MiB of %d GiB were sent; memory %d KiB, then %d KiB at most", taken.Load()>>20, count, before>>10, peak>>10)
	if taken.Load() > count*(32<<20) { // the kernel's buffers take some
		t.Errorf("%d bytes were taken of %d clients without the key", taken.Load(), count)
	}
	if peak > before+count*(128<<10)+(16<<20) {
		t.Errorf("memory grew from %d to %d bytes", before, peak)
	}
}

// wireChunks is an endless chunked body.
type wireChunks struct{}

func (wireChunks) Read(p []byte) (int, error) {
	chunk := "1000\r\n" + strings.Repeat("x", 0x1000) + "\r\n"
	n := 0
	for n+len(chunk) <= len(p) {
		n += copy(p[n:], chunk)
	}
	return n, nil
}

func TestTenThousandConnections(t *testing.T) {
	for _, test := range []struct {
		name string
		text string // sent on each, %s is the key
		wait bool   // for an answer
		most int    // bytes of memory each
	}{
		{"that send nothing", "", false, 16 << 10},
		{"idle after a request", "GET /nowhere HTTP/1.1\r\nHost: h\r\nX-Duxcore-CoreKey: %s\r\n\r\n", true, 32 << 10},
		{"with unfinished headers", "GET / HTTP/1.1\r\nHost: h\r\nX-Duxcore-CoreKey: %s\r\n" + strings.Repeat("X-A: aaaaaaaaa\r\n", 900), false, 128 << 10},
	} {
		t.Run(test.name, func(t *testing.T) {
			d, pid := wireProcess(t, newFakeEngine(t).host())
			before, _ := wireMemory(t, pid)
			count := wireConnections(t)
			text := strings.Replace(test.text, "%s", d.key, 1)
			conns := make(chan net.Conn, count)
			var dialers sync.WaitGroup
			for i := range 100 {
				dialers.Go(func() {
					for range count/100 + min(1, max(0, count%100-i)) {
						conn, err := net.Dial("tcp", strings.TrimPrefix(d.url, "http://"))
						if err != nil {
							t.Error(err)
							return
						}
						conns <- conn
						io.WriteString(conn, text)
						if test.wait {
							wireStatus(t, conn)
						}
					}
				})
			}
			dialers.Wait()
			for range 20 {
				d.do(t, "GET", "/health", "").want(t, 204)
			}
			now, peak := wireMemory(t, pid)
			each := (now - before) / count
			t.Logf("%d connections %s: %d bytes each; memory %d KiB, then %d KiB, at most %d KiB", len(conns), test.name, each, before>>10, now>>10, peak>>10)
			if each > test.most {
				t.Errorf("%d bytes for each connection", each)
			}
			for range len(conns) {
				(<-conns).Close()
			}
			d.do(t, "GET", "/health", "").want(t, 204)
		})
	}
}

// wireConnections is ten thousand, or as many as the process may have open.
func wireConnections(t *testing.T) int {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	return int(min(10_000, limit.Max-500))
}
