package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	goversion "go/version"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"time"
)

// flagTest is a flag with two values that are not its default, and where they arrive.
type flagTest struct {
	name, env, fallback string
	values              [2]string
	get                 func(config) any
	want                [2]any
}

var flags = []flagTest{
	{"addr", "DUXCORE_ADDR", ":8000", [2]string{"127.0.0.1:1", ":2"},
		func(c config) any { return c.addr }, [2]any{"127.0.0.1:1", ":2"}},
	{"corekey", "DUXCORE_COREKEY", "corekey.bin", [2]string{"/a", "/b"},
		func(c config) any { return c.coreKeyPath }, [2]any{"/a", "/b"}},
	{"binds", "DUXCORE_BINDS", "binds", [2]string{"/a", "/b"},
		func(c config) any { return c.binds }, [2]any{"/a", "/b"}},
	{"tls-cert", "DUXCORE_TLS_CERT", "", [2]string{"/a", "/b"},
		func(c config) any { return c.tlsCert }, [2]any{"/a", "/b"}},
	{"tls-key", "DUXCORE_TLS_KEY", "", [2]string{"/a", "/b"},
		func(c config) any { return c.tlsKey }, [2]any{"/a", "/b"}},
	{"network", "DUXCORE_NETWORK", "", [2]string{"tenants", "none"},
		func(c config) any { return c.network }, [2]any{"tenants", "none"}},
	{"pids-limit", "DUXCORE_PIDS_LIMIT", "2048", [2]string{"1", "99"},
		func(c config) any { return c.pidsLimit }, [2]any{int64(1), int64(99)}},
	{"stop-timeout", "DUXCORE_STOP_TIMEOUT", "30s", [2]string{"1s", "2m"},
		func(c config) any { return c.stopTimeout }, [2]any{time.Second, 2 * time.Minute}},
	{"create-timeout", "DUXCORE_CREATE_TIMEOUT", "30m0s", [2]string{"1s", "2h"},
		func(c config) any { return c.createTimeout }, [2]any{time.Second, 2 * time.Hour}},
	{"fetch-allow", "DUXCORE_FETCH_ALLOW", "", [2]string{"10.0.0.0/8, fd00::/8", "192.168.0.0/16"},
		func(c config) any { return fmt.Sprint(c.fetchAllow) },
		[2]any{"[10.0.0.0/8 fd00::/8]", "[192.168.0.0/16]"}},
	{"max-bind-bytes", "DUXCORE_MAX_BIND_BYTES", "10737418240", [2]string{"1", "2"},
		func(c config) any { return c.maxBindBytes }, [2]any{int64(1), int64(2)}},
	{"max-bind-files", "DUXCORE_MAX_BIND_FILES", "250000", [2]string{"1", "2"},
		func(c config) any { return c.maxBindFiles }, [2]any{int64(1), int64(2)}},
	{"max-image-bytes", "DUXCORE_MAX_IMAGE_BYTES", "17179869184", [2]string{"1", "2"},
		func(c config) any { return c.maxImageBytes }, [2]any{int64(1), int64(2)}},
}

// otherHalf completes what is valid only as a pair.
var otherHalf = map[string]string{"tls-cert": "tls-key", "tls-key": "tls-cert"}

func TestEveryFlagHasAnEnvironmentTwinAndBeatsIt(t *testing.T) {
	t.Parallel()
	for _, f := range flags {
		var pair []string
		if other := otherHalf[f.name]; other != "" {
			pair = []string{"-" + other, "x"}
		}
		env := environment(map[string]string{f.env: f.values[0]})
		for _, test := range []struct {
			args []string
			env  []string
			want any
		}{
			{[]string{"-" + f.name, f.values[0]}, environment(nil), f.want[0]},
			{[]string{"--" + f.name + "=" + f.values[1]}, environment(nil), f.want[1]},
			{nil, env, f.want[0]},
			{[]string{"-" + f.name, f.values[1]}, env, f.want[1]},
		} {
			c, err := parseConfig(append(test.args, pair...), test.env, io.Discard)
			if got := f.get(c); err != nil || got != test.want {
				t.Errorf("-%s with %q: %v, %v; want %v", f.name, test.args, got, err, test.want)
			}
		}
	}
}

func TestHelpNamesEachFlagAndItsTwin(t *testing.T) {
	t.Parallel()
	for _, arg := range []string{"-h", "-help", "--help"} {
		var out bytes.Buffer
		if _, err := parseConfig([]string{arg}, environment(nil), &out); !errors.Is(err, flag.ErrHelp) {
			t.Fatalf("%s: %v", arg, err)
		}
		wanted := []string{"-max-image-bytes is DUXCORE_MAX_IMAGE_BYTES", "\n  -version"}
		for _, f := range flags {
			wanted = append(wanted, "\n  -"+f.name)
		}
		for _, want := range wanted {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%s: %q is not in %s", arg, want, &out)
			}
		}
	}
}

func TestBadConfigurationIsRefused(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		args []string
		env  map[string]string
		want []string // all of them in one error
	}{
		{[]string{"-network", "host"}, nil, []string{"-network"}},
		{[]string{"-network", "container:web"}, nil, []string{"-network"}},
		{nil, map[string]string{"DUXCORE_NETWORK": "host"}, []string{"-network"}},
		{[]string{"-tls-cert", "a"}, nil, []string{"-tls-cert and -tls-key go together"}},
		{[]string{"-tls-key", "a"}, nil, []string{"-tls-cert and -tls-key go together"}},
		{[]string{"-tls-key", "a"}, map[string]string{"DUXCORE_TLS_CERT": ""},
			[]string{"-tls-cert and -tls-key go together"}},
		{[]string{"-addr", ""}, nil, []string{"-addr"}},
		{[]string{"-pids-limit", "0"}, nil, []string{"-pids-limit"}},
		{[]string{"-pids-limit", "-1"}, nil, []string{"-pids-limit"}},
		{[]string{"-pids-limit", "many"}, nil, []string{"-pids-limit", `"many"`}},
		{nil, map[string]string{"DUXCORE_PIDS_LIMIT": ""}, []string{"DUXCORE_PIDS_LIMIT"}},
		{[]string{"-stop-timeout", "30"}, nil, []string{"-stop-timeout", `"30"`}},
		{[]string{"-stop-timeout", "-1s"}, nil, []string{"-stop-timeout"}},
		{[]string{"-create-timeout", "0"}, nil, []string{"-create-timeout"}},
		{[]string{"-max-bind-bytes", "0"}, nil, []string{"-max-bind-bytes"}},
		{[]string{"-max-bind-bytes", "10GiB"}, nil, []string{"-max-bind-bytes"}},
		{[]string{"-max-bind-files", "-5"}, nil, []string{"-max-bind-files"}},
		{[]string{"-max-image-bytes", "0"}, nil, []string{"-max-image-bytes"}},
		{[]string{"-fetch-allow", "10.0.0.0"}, nil, []string{"-fetch-allow"}},
		{[]string{"-fetch-allow", "10.0.0.0/8,10.0.0.0/33"}, nil, []string{"-fetch-allow"}},
		{[]string{"-fetch-allow", "intranet"}, nil, []string{"-fetch-allow", "intranet"}},
		{[]string{"-privileged"}, nil, []string{"privileged"}},
		{[]string{"-addr"}, nil, []string{"addr"}},
		{[]string{"serve"}, nil, []string{`"serve"`}},
		{[]string{"---"}, nil, nil},
		{[]string{"-=x"}, nil, nil},
		{[]string{"-pids-limit", "x", "---y", "-stop-timeout", "z"}, nil, nil},
		{
			[]string{"-network", "host", "-tls-cert", "a", "-max-bind-files", "0"},
			map[string]string{"DUXCORE_FETCH_ALLOW": "y", "DUXCORE_CREATE_TIMEOUT": "z"},
			[]string{"-network", "-tls-cert", "-max-bind-files", "DUXCORE_FETCH_ALLOW", "DUXCORE_CREATE_TIMEOUT"},
		},
		{
			[]string{"-network", "host", "-pids-limit", "x"},
			map[string]string{"DUXCORE_FETCH_ALLOW": "y"},
			[]string{"-pids-limit", "DUXCORE_FETCH_ALLOW"},
		},
	} {
		_, err := parseConfig(test.args, environment(test.env), io.Discard)
		if err == nil {
			t.Errorf("%q %v is accepted", test.args, test.env)
			continue
		}
		for _, want := range test.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q %v: %q is not in %q", test.args, test.env, want, err)
			}
		}
	}
}

func TestVersionIsAFlagAlone(t *testing.T) {
	t.Parallel()
	c, err := parseConfig([]string{"-version"}, environment(nil), io.Discard)
	if err != nil || !c.version {
		t.Errorf("%v, %v", c.version, err)
	}
	c, err = parseConfig(nil, environment(map[string]string{"DUXCORE_VERSION": "1"}), io.Discard)
	if err == nil || c.version {
		t.Errorf("from the environment: %v, %v", c.version, err)
	}
	if got := version(); !strings.HasPrefix(got, "duxcore-daemon ") || !strings.Contains(got, "go1.") {
		t.Errorf("the version is %q", got)
	}
}

func TestSystemdIsToldWhenTheDaemonIsReady(t *testing.T) {
	socket := t.TempDir() + "/notify"
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	must(t, err)
	defer systemd.Close()
	raw, err := systemd.SyscallConn()
	must(t, err)
	told := func() (said string) { // without waiting: what was sent is there
		text := make([]byte, 64)
		raw.Read(func(fd uintptr) bool {
			if n, _, err := syscall.Recvfrom(int(fd), text, syscall.MSG_DONTWAIT); err == nil {
				said = string(text[:n])
			}
			return true
		})
		return said
	}
	t.Setenv("NOTIFY_SOCKET", socket)
	e := newFakeEngine(t)
	held, release := crowdHold(e, func(string) bool { return true })
	early := make(chan string, 1)
	go func() { // ends with the start
		<-held
		early <- told()
		release()
	}()
	d := startDaemon(t, e.host(), nil)
	if said := <-early; said != "" {
		t.Errorf("before it has settled: %q", said)
	}
	if said := told(); said != "READY=1" {
		t.Errorf("%q", said)
	}
	if log := d.log.String(); strings.Contains(log, "systemd") {
		t.Error(log)
	}

	for _, change := range []func(c *config){
		func(c *config) { c.addr = strings.TrimPrefix(d.url, "http://") }, // in use
		func(c *config) { c.tlsCert, c.tlsKey = "/missing", "/missing" },
	} {
		if _, err := startError(t, change); err == nil || told() != "" {
			t.Errorf("%v, and systemd was told that it is ready", err)
		}
	}

	t.Setenv("NOTIFY_SOCKET", socket+"-missing")
	d = startDaemon(t, e.host(), nil)
	d.do(t, "GET", "/health", "").want(t, 204)
	if log := d.log.String(); !strings.Contains(log, "cannot tell systemd") {
		t.Error(log)
	}
}

func TestPlainHTTPBeyondLoopbackIsOneWarning(t *testing.T) {
	t.Parallel()
	const warning = "without TLS"
	cert, key, _ := selfSigned(t)
	for _, test := range []struct {
		addr, cert, key string
		want            int
	}{
		{":0", "", "", 1}, {"0.0.0.0:0", "", "", 1}, {"127.0.0.1:0", "", "", 0}, {"[::1]:0", "", "", 0},
		{":0", cert, key, 0},
	} {
		_, d := start(t, func(c *config) {
			c.addr, c.tlsCert, c.tlsKey = test.addr, test.cert, test.key
		})
		if got := strings.Count(d.log.String(), warning); got != test.want {
			t.Errorf("%s with the certificate %q: %d warnings", test.addr, test.cert, got)
		}
	}
}

func TestBindRootIsPrivateAndMayBeALink(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addImage("img:1")
	dir := t.TempDir()
	must(t, errors.Join(os.Mkdir(dir+"/real", 0o755), os.Symlink("real", dir+"/link")))
	d := startDaemon(t, e.host(), func(c *config) { c.binds = dir + "/link" })
	if info, err := os.Stat(dir + "/real"); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
	if c, _ := e.container("web"); c.HostConfig.Mounts[0].Source != dir+"/link/web" ||
		c.Labels["duxcore.binds"] != dir+"/link" {
		t.Errorf("mounts %v, labels %v", c.HostConfig.Mounts, c.Labels)
	}
}

func TestWhatTheDaemonCannotUseStopsIt(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/file", nil, 0o600))
	cert, _, _ := selfSigned(t)
	_, otherKey, _ := selfSigned(t)
	var unusable []func(*config)
	for _, path := range []string{dir + "/file", dir + "/file/below", "/proc/binds", "/dev/null"} {
		unusable = append(unusable, func(c *config) { c.binds = path })
	}
	for _, host := range []string{"nonsense", "unix//x"} {
		unusable = append(unusable, func(c *config) { c.dockerHost = host })
	}
	for _, key := range []string{otherKey, cert, dir + "/missing"} {
		unusable = append(unusable, func(c *config) { c.tlsCert, c.tlsKey = cert, key })
	}
	for i, change := range unusable {
		if _, err := startError(t, change); err == nil {
			t.Errorf("it runs with %d", i)
		}
	}
}

func TestAddressInUseStopsTheDaemonBeforeItCreatesAnything(t *testing.T) {
	t.Parallel()
	_, d := start(t, nil)
	var cfg config
	_, err := startError(t, func(c *config) { c.addr = strings.TrimPrefix(d.url, "http://"); cfg = *c })
	if err == nil {
		t.Error("runs on an address in use")
	}
	for _, path := range []string{cfg.coreKeyPath, cfg.binds} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("it made %s: %v", path, err)
		}
	}
}

func TestGoHasTheFixesOfOsRoot(t *testing.T) {
	text, err := os.ReadFile("go.mod")
	must(t, err)
	_, rest, _ := strings.Cut(string(text), "\ngo ")
	asked, _, _ := strings.Cut(rest, "\n")
	if goversion.Compare("go"+asked, "go1.26.5") < 0 {
		t.Errorf("go.mod asks for go %s only", asked)
	}
}

// A daemon closes each file and connection, also one that no goroutine waits for.
func TestNoDescriptorIsLeft(t *testing.T) { // not parallel: it counts those of the process
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // the collector would close what was forgotten
	use := func(t *testing.T) {
		e, d := consoleStart(t, "", func(c *config) {
			c.fetchAllow, c.timeouts.clientWrite = loopback, haste()
		})
		archive := serveArchives(t, map[string][]byte{"/good": tgz(file("a", "b")), "/bad": tgz(file("../a", "b"))})
		for path, status := range map[string]int{"good": 201, "bad": 400} {
			extra := fmt.Sprintf(`"bind_contents":"%s/%s"`, archive, path)
			d.do(t, "POST", "/service", createBodyJSON(path, extra)).want(t, status)
			d.do(t, "POST", "/docker/image", map[int]string{201: wholeTar(), 400: "no tar"}[status]).want(t, status)
		}
		for range 20 {
			statsOpen(t, d, "web").next(t)
			logsOpen(t, d, "/service/web/logs?follow=true")
			d.do(t, "POST", "/service/web/stdin", "text").want(t, 204)
		}
		e.setDeaf("web", true)
		d.do(t, "POST", "/service/web/stdin", strings.Repeat("x", 1<<20)).want(t, 504)
		d.do(t, "POST", "/service/web/ctl", `{"op":"stop"}`).want(t, 204)
		for _, id := range []string{"web", "good"} {
			d.do(t, "DELETE", "/service/"+id, "").want(t, 204)
		}
		d.stop()
		e.close()
	}
	t.Run("once", use) // the runtime and the resolver open some that stay
	before := descriptors()
	t.Run("again", use)
	if !poll(func() bool { return len(descriptors()) <= len(before) }) {
		t.Errorf("there were %q, there are %q", before, descriptors())
	}
}

// failingListener fails when it is told to, as for want of memory.
type failingListener struct {
	net.Listener
	fail chan struct{}
}

func (l *failingListener) Accept() (net.Conn, error) {
	accepted := make(chan net.Conn, 1)
	go func() { // ends with the listener
		if conn, err := l.Listener.Accept(); err == nil {
			accepted <- conn
		}
	}()
	select {
	case conn := <-accepted:
		return conn, nil
	case <-l.fail:
		return nil, errors.New("no memory for a connection")
	}
}

func TestListenerThatFailsLetsChangesFinish(t *testing.T) {
	t.Parallel()
	e, s := bareService(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	failing := &failingListener{listener, make(chan struct{})}
	served := make(chan error, 1)
	serving, stop := context.WithCancel(t.Context())
	defer stop()
	go func() { served <- s.serve(serving, stop, failing, nil) }() // ends with the listener
	d := &daemon{url: "http://" + listener.Addr().String(), client: &http.Client{Transport: &http.Transport{}}}
	sum := sha256.Sum256([]byte("key"))
	s.key, d.key = sum, "key"
	held, release := crowdHold(e, func(call string) bool { return strings.Contains(call, "/stop") })
	stopped := crowdSend(t, d, "POST", "/service/web/ctl", `{"op":"stop"}`)
	<-held
	close(failing.fail)
	select {
	case err := <-served:
		t.Errorf("it did not wait for the change: %v", err)
	case <-serving.Done(): // it has begun to end
	}
	release()
	(<-stopped).want(t, 204)
	if err := <-served; err == nil || !strings.Contains(err.Error(), "no memory") {
		t.Errorf("it ended with %v", err)
	}
}

// After SIGTERM the daemon takes no connection, and finishes what is under way, unless there is a second one.
func TestSIGTERMWaitsForAChangeAndASecondOneDoesNot(t *testing.T) {
	t.Parallel()
	for _, second := range []bool{false, true} {
		e := newFakeEngine(t)
		e.addImage("img:1")
		d, pid := wireProcess(t, e.host())
		consoleService(t, d, "web", "")
		held, release := crowdHold(e, func(call string) bool { return strings.Contains(call, "/stop") })
		answered := make(chan int, 1)
		go func() { // ends with the daemon
			answer, err := d.client.Do(d.request(t, "POST", "/service/web/ctl", strings.NewReader(`{"op":"stop"}`)))
			if err != nil {
				answered <- 0
				return
			}
			answer.Body.Close()
			answered <- answer.StatusCode
		}()
		<-held
		must(t, syscall.Kill(pid, syscall.SIGTERM))
		waitFor(t, "the end of the listener", func() bool {
			conn, err := net.Dial("tcp", strings.TrimPrefix(d.url, "http://"))
			if err == nil {
				conn.Close()
			}
			return err != nil
		})
		want := 204
		if second {
			want = 0
			// The daemon gives the signal back its default action shortly after the first one.
			waitFor(t, "the end of the daemon", func() bool {
				syscall.Kill(pid, syscall.SIGTERM)
				ended, _ := syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
				return ended == pid
			})
			d.stop = func() error { return nil }
		}
		release()
		if status := <-answered; status != want {
			t.Errorf("a second signal: %v; the stop is answered with %d", second, status)
		}
	}
}
