// Which of the test worlds to take for what, the smallest first:
//
//   - A function alone, for what computes.
//   - bareServer, or bareService with the service web: the operations of a daemon with a fake engine, without
//     HTTP and without rounds of settling.
//   - start, or startWithService and startWithRunning with the service web, or consoleStart with fields of
//     its own: a whole daemon behind HTTP, with a fake engine. Most tests take this one. d.do sends a
//     request, and want says what the answer has to be. e.setIntercept answers an engine call in another way,
//     crowdHold holds one, and e.calls tells what the daemon has asked for. An unexpected call fails the
//     test. sendRaw and wireDial are for requests that no HTTP client sends; wireProcess starts the program
//     as it is shipped.
//   - newExploration (explore_test.go): all histories of a few requests, for the order of an operation's
//     steps.
//   - newDisk (powerloss_test.go, with the build tag integration, as all below): a file system whose power is
//     cut, for what must be on the disk.
//   - newMachine (machine_test.go): a daemon on a real engine.
//   - newDeathWorld (deathworld_test.go): a daemon as a process that is killed, on a real engine.
//
// Where a daemon ends that start or newMachine has started, it must leave no goroutine and no open file: see
// wantNothingOpen. The archives of all tests are made by archiveOf, and by tgz for bind_contents. A test that
// asks for less with -short, or with the race detector, uses brief.

package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	stdlog "log"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestMain lets more tests run at a time than there are processors: most wait for most of their time.
func TestMain(m *testing.M) {
	flag.Parse()
	chosen := false
	flag.Visit(func(f *flag.Flag) { chosen = chosen || f.Name == "test.parallel" || f.Name == "test.fuzz" })
	if !chosen && raceDetector() {
		flag.Set("test.parallel", "8")
	} else if !chosen {
		flag.Set("test.parallel", "20")
	}
	if _, ok := dialects[*dialectName]; !ok {
		fmt.Fprintln(os.Stderr, "-dialect: there is no such dialect")
		os.Exit(2)
	}
	stdlog.SetOutput(io.Discard) // on which net/http says what engines that break HTTP have sent
	debug.SetGCPercent(400)      // the collector would take a sixth of the time
	os.Exit(m.Run())
}

// raceDetector reports whether the tests were built with -race, with which all takes ten times as long.
func raceDetector() bool {
	build, _ := debug.ReadBuildInfo()
	return slices.Contains(build.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// brief reports whether an exhaustive test should be a short one.
func brief() bool { return testing.Short() || raceDetector() }

// haste returns a timeout of which a test waits for the end. What does not hang takes less, if others use all
// processors, too.
func haste() time.Duration {
	if raceDetector() {
		return 5 * time.Second
	}
	return 2 * time.Second
}

// patience is how long a test waits for what has to happen, on a machine of which others use all processors.
const patience = time.Minute

// tempInMemory returns a directory in memory, where there is one: on a disk, the daemon's syncs
// take most of the time of a test with thousands of steps.
func tempInMemory(t testing.TB) string {
	t.Helper()
	memory := "/dev/shm"
	if _, err := os.Stat(memory); err != nil {
		memory = ""
	}
	dir, err := os.MkdirTemp(memory, "duxcore-test-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// daemon is one that runs, and how to reach it.
type daemon struct {
	url    string
	key    string // base64
	binds  string // absolute path
	log    *syncBuffer
	client *http.Client
	stop   func() error // stops it, once, and returns what run returned
	quoted string       // a path of the host that clients name, and errors quote
	fuzzed bool         // errors quote what a fuzzer has sent, which may look like anything
}

// syncBuffer is a log that can be read while it is written.
type syncBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

var listening = regexp.MustCompile(`msg=listening addr=(\S+)`)

// url returns where the daemon that writes the log listens, or nothing if it does not yet.
func (b *syncBuffer) url() string {
	if found := listening.FindStringSubmatch(b.String()); found != nil {
		return "http://" + found[1]
	}
	return ""
}

// startDaemon runs the daemon against the engine at dockerHost until the test ends.
func startDaemon(t testing.TB, dockerHost string, change func(*config)) *daemon {
	t.Helper()
	cfg, err := parseConfig(nil, nil, io.Discard)
	must(t, err)
	dir := t.TempDir()
	if dockerHost != "" { // the engine is a fake one, which needs no disk, and no rounds that tests would see
		dir, cfg.timeouts.settleInterval = tempInMemory(t), time.Hour
	}
	cfg.addr, cfg.coreKeyPath, cfg.binds = "127.0.0.1:0", filepath.Join(dir, "corekey.bin"),
		filepath.Join(dir, "binds")
	cfg.dockerHost = dockerHost
	if change != nil {
		change(&cfg)
	}
	d := &daemon{log: &syncBuffer{}, client: &http.Client{Transport: &http.Transport{}, Timeout: 2 * patience}}
	ctx, cancel := context.WithCancel(context.Background())
	listening, ended := make(chan net.Addr, 1), make(chan error, 1)
	log := slog.New(slog.NewTextHandler(d.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	label := strconv.FormatInt(daemons.Add(1), 10)
	go pprof.Do(ctx, pprof.Labels("daemon", label), func(context.Context) {
		var err error
		// A program that another test starts has a stopped daemon's lock until it has been executed.
		poll(func() bool {
			err = run(ctx, cfg, log, func(a net.Addr) { listening <- a })
			return err == nil || !strings.Contains(err.Error(), "in use by another daemon")
		})
		ended <- err
	})
	d.stop = sync.OnceValue(func() error {
		d.client.CloseIdleConnections()
		cancel()
		return <-ended
	})
	select {
	case addr := <-listening:
		d.url = "http://" + addr.String()
	case err := <-ended:
		cancel()
		t.Fatalf("the daemon did not start: %v", err)
	}
	t.Cleanup(func() {
		if err := d.stop(); err != nil {
			t.Errorf("the daemon ended with: %v", err)
		}
		wantNothingOpen(t, label, dir)
	})
	key, err := os.ReadFile(cfg.coreKeyPath)
	must(t, err)
	d.key = base64.StdEncoding.EncodeToString(key)
	d.binds = cfg.binds
	return d
}

// daemons counts the daemons of the tests. A daemon's goroutines inherit a label with its number.
var daemons atomic.Int64

// daemonsLeave is true when a daemon has left something. Nobody waits for what the others leave then.
var daemonsLeave atomic.Bool

// wantNothingOpen fails the test unless all goroutines of a daemon end that has ended, and all files that it
// had open in its directory are closed.
func wantNothingOpen(t testing.TB, label, dir string) {
	t.Helper()
	var open []string
	poll(func() bool {
		open = append(goroutines(label), openFiles(dir)...)
		return len(open) == 0 || daemonsLeave.Load()
	})
	if len(open) > 0 && !daemonsLeave.Swap(true) {
		t.Errorf("the daemon has ended, and has left:\n%s", strings.Join(open, "\n"))
	}
}

// goroutines returns the stacks of the goroutines of the daemon with this label.
func goroutines(label string) (stacks []string) {
	var profile bytes.Buffer
	pprof.Lookup("goroutine").WriteTo(&profile, 1)
	for stack := range strings.SplitSeq(profile.String(), "\n\n") {
		if strings.Contains(stack, fmt.Sprintf("\n# labels: {%q:%q}\n", "daemon", label)) {
			stacks = append(stacks, stack)
		}
	}
	return stacks
}

// openFiles returns the paths below dir that the process has open.
func openFiles(dir string) (paths []string) {
	for _, path := range descriptors() {
		if strings.HasPrefix(path, dir+"/") {
			paths = append(paths, path)
		}
	}
	return paths
}

// descriptors returns what the process's descriptors refer to, a path where it is a file.
func descriptors() (targets []string) {
	open, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range open {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil { // unless it was closed meanwhile
			targets = append(targets, to)
		}
	}
	return targets
}

// bindDirs returns what is in a bind root: bind directories by the services' ids, marks, and records whose
// service has no directory.
func bindDirs(t testing.TB, binds string) (names []string) {
	t.Helper()
	for _, dir := range []string{".", markDir, recordDir} {
		entries, err := os.ReadDir(filepath.Join(binds, dir))
		must(t, err)
		for _, entry := range entries {
			if name := entry.Name(); name[0] != '.' && (dir != recordDir || !slices.Contains(names, name)) {
				names = append(names, filepath.Join(dir, name))
			}
		}
	}
	return names
}

// answer is a response, read to its end.
type answer struct {
	status int
	header http.Header
	body   string
}

// request returns a request with the core key, to be changed and sent.
func (d *daemon) request(t testing.TB, method, path string, body io.Reader) *http.Request {
	t.Helper()
	r, err := http.NewRequest(method, d.url+path, body)
	must(t, err)
	r.Header.Set("X-Duxcore-CoreKey", d.key)
	return r
}

func (d *daemon) send(t testing.TB, r *http.Request) answer {
	t.Helper()
	response, err := d.client.Do(r)
	must(t, err)
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	must(t, err)
	a := answer{response.StatusCode, response.Header, string(body)}
	// The engine's words are passed on as they are.
	ours := !d.fuzzed && a.header.Get("Content-Type") == "application/json" &&
		!strings.Contains(a.body, "engine: ")
	if ours && a.status >= 400 {
		errorsClean(t, d, a.body)
	}
	return a
}

func (d *daemon) do(t testing.TB, method, path, body string) answer {
	t.Helper()
	return d.send(t, d.request(t, method, path, strings.NewReader(body)))
}

// kindsOfErrors returns the status of each kind of error by its name.
var kindsOfErrors = sync.OnceValue(func() map[string]int {
	source, err := os.ReadFile("errors.go")
	if err != nil {
		panic(err)
	}
	kinds := map[string]int{}
	constructed := regexp.MustCompile(`kind\{([0-9]{3}), "([a-z_]+)"\}`)
	for _, found := range constructed.FindAllStringSubmatch(string(source), -1) {
		kinds[found[2]], _ = strconv.Atoi(found[1])
	}
	return kinds
})

// want fails the test unless the answer has the status and the texts, and the one shape
// of errors if it is one.
func (a answer) want(t testing.TB, status int, substrings ...string) answer {
	t.Helper()
	if a.status != status {
		t.Fatalf("status %d, want %d; body %s", a.status, status, a.body)
	}
	for _, text := range substrings {
		if !strings.Contains(a.body, text) {
			t.Errorf("body %s, want %q in it", a.body, text)
		}
	}
	if status < 400 {
		return a
	}
	var shape struct {
		Error struct {
			Code                      int
			Reason, Kind, Description string
		}
	}
	decoder := json.NewDecoder(strings.NewReader(a.body))
	decoder.DisallowUnknownFields()
	err := decoder.Decode(&shape)
	if e := shape.Error; err != nil || e.Code != status || kindsOfErrors()[e.Kind] != status ||
		e.Reason != http.StatusText(status) || e.Description == "" {
		t.Errorf("body %s is not an error of the one shape: %v", a.body, err)
	}
	if got := a.header.Get("Content-Type"); got != "application/json" {
		t.Errorf("an error's Content-Type is %q", got)
	}
	return a
}

// createBodyJSON returns a body of POST /service. Fields in extra, which may be empty,
// take the place of those of the same name.
func createBodyJSON(id, extra string) string {
	quoted, _ := json.Marshal(id)
	var fields []string
	for _, field := range []string{`"id":` + string(quoted), `"image":"img:1"`, `"bind_dir":"/data"`, extra} {
		name, _, _ := strings.Cut(field, ":")
		if field == extra || !strings.Contains(extra, name+":") {
			fields = append(fields, field)
		}
	}
	return `{"type":"raw","params":{` + strings.TrimSuffix(strings.Join(fields, ","), ",") + `}}`
}

// waitFor returns when the condition holds.
func waitFor(t testing.TB, what string, condition func() bool) {
	t.Helper()
	if !poll(condition) {
		t.Fatalf("waited for %v: %s", patience, what)
	}
}

// must fails the test if what it needs cannot be had.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mountTmpfs mounts a small file system, which takes root, until the test ends.
func mountTmpfs(t testing.TB, dir, options string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(dir, 0o700),
		syscall.Mount("tmpfs", dir, "tmpfs", 0, options)); err != nil {
		t.Fatalf("this test mounts a small file system, which takes root and CAP_SYS_ADMIN: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// poll reports whether the condition came to hold.
func poll(condition func() bool) bool { return pollFor(patience, condition) }

// pollFor reports whether the condition came to hold within limit. It looks less and less often, or the looks
// of many tests would take all the processor time from what they wait for.
func pollFor(limit time.Duration, condition func() bool) bool {
	deadline := time.Now().Add(limit)
	for wait := time.Millisecond; !condition(); wait = min(2*wait, 50*time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(wait)
	}
	return true
}

// bareServer returns a daemon's server on a root of its own, without the network and without
// a run that would settle: a test calls its operations.
func bareServer(t *testing.T, e *fakeEngine, change func(*config)) *server {
	t.Helper()
	cfg, err := parseConfig(nil, nil, io.Discard)
	must(t, err)
	if change != nil {
		change(&cfg)
	}
	binds, err := openBinds(tempInMemory(t))
	must(t, err)
	t.Cleanup(binds.close)
	must(t, binds.adopt())
	engine, err := newEngine(e.host())
	must(t, err)
	must(t, engine.negotiate(t.Context()))
	t.Cleanup(func() { engine.api().Close() })
	life, end := context.WithCancel(context.Background())
	t.Cleanup(end)
	return newServer(life, life, cfg, keyDigest{}, engine, binds, slog.New(slog.DiscardHandler))
}

// bareService returns such a server with a service web.
func bareService(t *testing.T) (*fakeEngine, *server) {
	t.Helper()
	e := newFakeEngine(t)
	e.addImage("img:1")
	s := bareServer(t, e, nil)
	must(t, s.services.create(t.Context(), serviceParams{ID: "web", Image: "img:1", BindDir: "/data"}, ""))
	return e, s
}

// countCalls returns how many calls have the text in them.
func countCalls(calls []string, text string) (count int) {
	for _, call := range calls {
		if strings.Contains(call, text) {
			count++
		}
	}
	return count
}

// head returns a request line and the header that every request needs, without its end.
func (d *daemon) head(methodAndPath string) string {
	return methodAndPath + " HTTP/1.1\r\nHost: h\r\nX-Duxcore-CoreKey: " + d.key + "\r\n"
}

func wireDial(t testing.TB, d *daemon) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(d.url, "http://"))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
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
	must(t, err)
	response.Body.Close()
	return response.StatusCode
}

// wireProcess starts the daemon, built as it is shipped, as a process of its own, and
// returns its process id.
func wireProcess(t testing.TB, engineHost string, args ...string) (*daemon, int) {
	t.Helper()
	program, err := shipped()
	must(t, err)
	dir := t.TempDir()
	d := &daemon{log: &syncBuffer{}, binds: filepath.Join(dir, "binds"),
		client: &http.Client{Transport: &http.Transport{}, Timeout: 2 * patience}}
	process := exec.Command(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), program.Fd()),
		append(args, "-addr", "127.0.0.1:0", "-corekey", filepath.Join(dir, "corekey.bin"), "-binds", d.binds)...)
	process.Env, process.Stderr = append(os.Environ(), "DOCKER_HOST="+engineHost), d.log
	must(t, process.Start())
	d.stop = sync.OnceValue(func() error {
		process.Process.Signal(syscall.SIGTERM)
		return process.Wait()
	})
	t.Cleanup(func() {
		if err := d.stop(); err != nil {
			t.Errorf("the daemon ended with: %v\n%s", err, d.log)
		}
	})
	waitFor(t, "the daemon listens", func() bool { return d.log.url() != "" })
	d.url = d.log.url()
	key, err := os.ReadFile(filepath.Join(dir, "corekey.bin"))
	must(t, err)
	d.key = base64.StdEncoding.EncodeToString(key)
	return d, process.Process.Pid
}

// allocatedBy returns how many bytes the process allocates, freed or not, while f runs.
func allocatedBy(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// An entry is one of a tar file, written by hand: archive/tar writes no broken ones.
type entry struct {
	name, link         string
	kind               byte // of the typeflags; 0 for a regular file
	mode               int64
	uid, gid           int64
	size               int64 // that the header claims; 0 for the body's own
	mtime              int64
	body               string
	realSize           int64 // of an old GNU sparse file without data
	checksumOff, noPad bool
}

// bytes returns the header and the padded body.
func (e entry) bytes() []byte {
	block := make([]byte, 512)
	if e.kind == 0 {
		e.kind = '0'
	}
	if e.mode == 0 {
		e.mode = 0o644
	}
	if e.size == 0 {
		e.size = int64(len(e.body))
	}
	copy(block[:100], e.name)
	tarNumber(block[100:108], e.mode)
	tarNumber(block[108:116], e.uid)
	tarNumber(block[116:124], e.gid)
	tarNumber(block[124:136], e.size)
	tarNumber(block[136:148], e.mtime)
	block[156] = e.kind
	copy(block[157:257], e.link)
	copy(block[257:], "ustar\x0000")
	if e.kind == 'S' {
		copy(block[257:], "ustar  \x00")
		tarNumber(block[483:495], e.realSize)
	}
	sealHeader(block)
	if e.checksumOff {
		block[150] ^= 1
	}
	all := append(block, e.body...)
	if !e.noPad {
		all = append(all, make([]byte, -len(e.body)&511)...)
	}
	return all
}

func file(name, body string) entry { return entry{name: name, body: body} }

func dir(name string) entry { return entry{name: name, kind: '5', mode: 0o755} }

func global(records ...string) entry { e := pax(records...); e.kind = 'g'; return e }

func hardLink(name, to string) entry { return entry{name: name, kind: '1', link: to} }

func symlink(name, target string) entry { return entry{name: name, kind: '2', link: target} }

func gzipped(parts ...[]byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	for _, part := range parts {
		w.Write(part)
	}
	w.Close()
	return b.Bytes()
}

func tgz(entries ...entry) []byte { return gzipped(archiveOf(entries...)) }

// archiveOf returns a whole tar archive.
func archiveOf(entries ...entry) []byte { return append(tarOf(entries...), tarEnd...) }

func tarOf(entries ...entry) (all []byte) {
	for _, e := range entries {
		all = append(all, e.bytes()...)
	}
	return all
}

var tarEnd = make([]byte, 1024)

var loopback = networks("127.0.0.0/8")

// A node is all there is to know about a file. Atime is 0 where reading a tree changes it.
type node struct {
	mode         fs.FileMode
	uid, gid     uint32
	mtime, atime int64
	content      string // or a link's target
	twin         string // the first path of the same file
	capability   string
	inode        uint64
}

// readTree reads all below dir but what is below skip. It leaves no trace in the times.
func readTree(t testing.TB, dir, skip string) map[string]node {
	t.Helper()
	nodes, first := map[string]node{}, map[uint64]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if path == skip {
			return fs.SkipDir
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		stat := info.Sys().(*syscall.Stat_t)
		name, _ := filepath.Rel(dir, path)
		n := node{mode: info.Mode(), uid: stat.Uid, gid: stat.Gid, mtime: info.ModTime().UnixNano(),
			inode: stat.Ino}
		switch {
		case d.Type() == fs.ModeSymlink:
			n.content, err = os.Readlink(path)
		case d.Type().IsRegular():
			n.atime = stat.Atim.Nano()
			n.content, err = readQuietly(path)
			value := make([]byte, 64)
			if size, err := syscall.Getxattr(path, "security.capability", value); err == nil {
				n.capability = string(value[:size])
			}
			if first[stat.Ino] == "" {
				first[stat.Ino] = name
			}
			n.twin = first[stat.Ino]
		}
		nodes[name] = n
		return err
	})
	must(t, err)
	return nodes
}

// serveArchives serves archives by path until the test ends, and returns its URL.
func serveArchives(t *testing.T, archives map[string][]byte) string {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		archive, ok := archives[r.URL.Path]
		if !ok {
			t.Errorf("the archive server was asked for %s", r.URL.Path)
		}
		w.Write(archive)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

func sealHeader(block []byte) {
	copy(block[148:156], "        ")
	sum := 0
	for _, b := range block {
		sum += int(b)
	}
	copy(block[148:], fmt.Sprintf("%06o\x00", sum))
}

// withChecksums returns a copy of a tar file with the right checksum in all that looks
// like a header.
func withChecksums(plain []byte) []byte {
	plain = slices.Clone(plain)
	for block := range slices.Chunk(plain, 512) {
		if len(block) == 512 && string(block[257:262]) == "ustar" {
			sealHeader(block)
		}
	}
	return plain
}

const unauthorizedBody = `{"error":{"code":401,"reason":"Unauthorized",` +
	`"description":"Accessing this daemon requires core authorization.","kind":"unauthorized"}}`

// plusSlashKey has + and / in its base64 form, and padding.
var plusSlashKey = []byte("\xfb\xff\xbf\xfe secret of the core \x00\x01\x02\x03\x04\x05\x06\x07")

// startError runs a daemon that is to fail, and returns its log and its error, or nil if it serves.
func startError(t *testing.T, change func(*config)) (log string, err error) {
	t.Helper()
	dir := t.TempDir()
	cfg, err := parseConfig([]string{"-addr", "127.0.0.1:0", "-corekey", dir + "/corekey.bin", "-binds", dir +
		"/binds"},
		nil, io.Discard)
	must(t, err)
	cfg.dockerHost = "unix://" + dir + "/no-engine"
	change(&cfg)
	// A daemon that serves all the same is stopped, and returns nil.
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	buffer := &syncBuffer{}
	err = run(ctx, cfg, slog.New(slog.NewTextHandler(buffer, nil)), func(net.Addr) { cancel() })
	return buffer.String(), err
}

func openTree(t *testing.T, dir string) *os.Root {
	t.Helper()
	tree, err := os.OpenRoot(dir)
	must(t, err)
	return tree
}

// engineImpatient makes every deadline short.
func engineImpatient(c *config) {
	c.createTimeout, c.stopTimeout, c.timeouts.engineRead = haste(), haste(), haste()
	c.timeouts.statsFrame = haste() / 2
}

// start starts a daemon on a fake engine that has the image img:1.
func start(t testing.TB, change func(*config)) (*fakeEngine, *daemon) {
	t.Helper()
	e := newFakeEngine(t)
	e.addImage("img:1")
	return e, startDaemon(t, e.host(), change)
}

// startWithService starts a daemon that has the one service "web", stopped.
func startWithService(t testing.TB) (*fakeEngine, *daemon) {
	t.Helper()
	e, d := start(t, nil)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	return e, d
}

// startWithRunning starts a daemon that has the one service "web", which runs.
func startWithRunning(t *testing.T, change func(*config)) (*fakeEngine, *daemon) {
	t.Helper()
	return consoleStart(t, "", change)
}

func networks(texts ...string) (list []netip.Prefix) {
	for _, text := range texts {
		list = append(list, netip.MustParsePrefix(text))
	}
	return list
}

// serveOn serves at one address of the loopback network.
func serveOn(t *testing.T, ip string, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	listener, err := net.Listen("tcp", ip+":0")
	must(t, err)
	s := httptest.NewUnstartedServer(handler)
	s.Listener.Close()
	s.Listener = listener
	s.Start()
	t.Cleanup(s.Close)
	return s
}

// startFetching starts a daemon that may fetch from the networks.
func startFetching(t *testing.T, allow ...string) (*daemon, *fakeEngine) {
	t.Helper()
	e, d := start(t, func(c *config) { c.fetchAllow = networks(allow...) })
	return d, e
}

func createFrom(t *testing.T, d *daemon, id, address string) answer {
	t.Helper()
	r := d.request(t, "POST", "/service", strings.NewReader(createBodyJSON(id,
		fmt.Sprintf(`"bind_contents":%q`, address))))
	r.Header.Set("X-Registry-Auth", "cmVnaXN0cnk=")
	return d.send(t, r)
}

// wantNothing fails if a create has left anything.
func wantNothing(t *testing.T, d *daemon, engine *fakeEngine) {
	t.Helper()
	if left := bindDirs(t, d.binds); len(left) > 0 || len(engine.names()) > 0 || len(engine.volumes) > 0 {
		t.Errorf("there are the directories %q, the containers %q, the volumes %v", left, engine.names(),
			engine.volumes)
	}
}

// crowdHold has the engine hold each call that matches until release is called or its
// client leaves. One arrives on held for each.
func crowdHold(e *fakeEngine, matches func(call string) bool) (held <-chan struct{}, release func()) {
	arrived, free := make(chan struct{}, 1000), make(chan struct{})
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !matches(r.Method + " " + versionPrefix.ReplaceAllString(r.URL.RequestURI(), "")) {
			return false
		}
		arrived <- struct{}{}
		select {
		case <-free:
			return false
		case <-r.Context().Done():
			return true
		}
	})
	return arrived, sync.OnceFunc(func() { close(free) })
}

// crowdSend sends a request in the background.
func crowdSend(t *testing.T, d *daemon, method, path, body string) <-chan answer {
	answers := make(chan answer, 1)
	go func() {
		defer close(answers)
		answers <- d.do(t, method, path, body)
	}()
	return answers
}

func environment(values map[string]string) (environ []string) {
	for name, value := range values {
		environ = append(environ, name+"="+value)
	}
	return environ
}

// errorsGo is what shows only in texts that Go or its HTTP library made for programmers.
var errorsGo = regexp.MustCompile(`%!|0x[0-9a-f]|\bstruct\b|` +
	`\b(json|http|tar|gzip|flate|main|os|fs|io|net|container|syscall): |` +
	`\b(container|main|json|image)\.[A-Z]|\bGo (value|struct)|\bunmarshal|<nil>|nil pointer|goroutine|` +
	`127\.0\.0\.1:\d+->|https?://%2F|openat|renameat`)

// errorsClean fails if an error's body tells what is none of the client's business.
func errorsClean(t testing.TB, d *daemon, body string) {
	t.Helper()
	var text struct{ Error struct{ Description string } }
	if err := json.Unmarshal([]byte(body), &text); err != nil {
		t.Errorf("no JSON: %s", body)
	}
	description := text.Error.Description
	if d.quoted != "" {
		description = strings.ReplaceAll(description, d.quoted, "")
	}
	key, _ := base64.StdEncoding.DecodeString(d.key)
	for _, secret := range []string{d.key, strings.TrimRight(d.key, "="), string(key), d.binds,
		filepath.Dir(d.binds), os.TempDir() + "/", "/var/lib"} {
		if secret != "" && strings.Contains(description, secret) {
			t.Errorf("%q is in %s", secret, body)
		}
	}
	if found := errorsGo.FindString(description); found != "" {
		t.Errorf("%q is in %s", found, body)
	}
}

// selfSigned writes a certificate for 127.0.0.1 and its key, and returns their paths and
// a pool that trusts it.
func selfSigned(t *testing.T) (cert, key string, trusted *x509.CertPool) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	must(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	must(t, err)
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(t.TempDir(), name)
		must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
		return path
	}
	trusted = x509.NewCertPool()
	parsed, err := x509.ParseCertificate(der)
	must(t, err)
	trusted.AddCert(parsed)
	return write("cert.pem", "CERTIFICATE", der), write("key.pem", "PRIVATE KEY", keyDER), trusted
}

// sendRaw sends text on a connection of its own and returns the answer, and whether
// the daemon closes the connection after it.
func sendRaw(t testing.TB, d *daemon, text string) (a answer, closed bool) {
	t.Helper()
	conn := wireDial(t, d)
	defer conn.Close()
	_, err := io.WriteString(conn, text)
	must(t, err)
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

// wholeTar returns a tar archive with one file.
func wholeTar() string { return string(archiveOf(entry{name: "hello", mode: 0o755, body: "world"})) }

// statsEnds are what ends a service's stream.
var statsEnds = map[string]func(*testing.T, *fakeEngine, *daemon){
	"stop": func(t *testing.T, e *fakeEngine, d *daemon) {
		d.do(t, "POST", "/service/web/ctl", `{"op":"stop"}`).want(t, 204)
	},
	"kill": func(t *testing.T, e *fakeEngine, d *daemon) {
		d.do(t, "POST", "/service/web/ctl", `{"op":"kill"}`).want(t, 204)
	},
	"delete": func(t *testing.T, e *fakeEngine, d *daemon) {
		d.do(t, "DELETE", "/service/web", "").want(t, 204)
	},
	"the daemon's end": func(t *testing.T, e *fakeEngine, d *daemon) {
		if err := d.stop(); err != nil {
			t.Error(err)
		}
	},
	"its process's end": func(t *testing.T, e *fakeEngine, d *daemon) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.byName("web").Running = false
	},
}

func statsOpen(t testing.TB, d *daemon, id string) statsStream {
	t.Helper()
	response, err := d.client.Do(d.request(t, "GET", "/service/"+id+"/stats?stream=true", nil))
	must(t, err)
	if response.StatusCode != 200 {
		t.Fatalf("status %d", response.StatusCode)
	}
	lines, left := make(chan string), make(chan struct{})
	leave := sync.OnceFunc(func() { close(left); response.Body.Close() })
	t.Cleanup(leave)
	go func() { // ends with the stream, or when the test leaves it
		defer close(lines)
		for reader := bufio.NewReader(response.Body); ; {
			line, err := reader.ReadString('\n')
			if err == nil {
				select {
				case lines <- line:
					continue
				case <-left:
				}
			} else if err == io.EOF && line != "" {
				t.Errorf("the stream ended within the line %q", line)
			}
			return
		}
	}()
	return statsStream{response.Header, lines, leave}
}
