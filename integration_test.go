//go:build integration

package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/mount"
	"github.com/docker/docker/client"
	"github.com/docker/go-connections/nat"
)

// These tests run the daemon on the machine's Docker Engine, and testdata/probe in its
// containers. They touch nothing that they did not make: others may use the engine.

// machine is a daemon on the real engine, with the probe's image imported through it.
type machine struct {
	*daemon
	engine *client.Client
	image  string // the probe's id
}

func newMachine(t testing.TB, change func(*config)) *machine {
	t.Helper()
	engine, err := client.NewClientWithOpts(client.FromEnv, client.WithAPIVersionNegotiation())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := engine.Ping(t.Context()); err != nil {
		t.Fatalf("these tests need a Docker Engine: %v", err)
	}
	t.Cleanup(func() { engine.Close() })
	m := &machine{daemon: startDaemon(t, "", change), engine: engine}
	m.image = m.importImage(t, string(imageOf(t, imageFile("probe", buildProbe(t)))))
	m.cleanUp(t, m.binds, m.image)
	return m
}

// buildProbe returns the static binary of testdata/probe.
func buildProbe(t testing.TB) string {
	t.Helper()
	binary, err := builtProbe()
	if err != nil {
		t.Fatal(err)
	}
	return binary
}

var builtProbe = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "probe")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", dir+"/probe", "./testdata/probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("cannot build the probe: %w\n%s", err, output)
	}
	binary, err := os.ReadFile(dir + "/probe")
	return string(binary), err
})

// imageEntry is one of a tar archive that a test makes.
type imageEntry struct {
	tar.Header
	content string
}

func imageFile(name, content string) imageEntry {
	return imageEntry{tar.Header{Name: name, Mode: 0o755, Size: int64(len(content)), Uid: 7, Gid: 8}, content}
}

func imageOf(t testing.TB, entries ...imageEntry) []byte {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, e := range entries {
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return archive.Bytes()
}

func gzipOf(t testing.TB, content []byte) []byte {
	t.Helper()
	var zipped bytes.Buffer
	w := gzip.NewWriter(&zipped)
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return zipped.Bytes()
}

func (m *machine) importImage(t testing.TB, archive string) (id string) {
	t.Helper()
	var body struct {
		ImageID string `json:"image_id"`
	}
	decode(t, m.do(t, "POST", "/docker/image", archive).want(t, http.StatusCreated).body, &body)
	return body.ImageID
}

// cleanUp removes, when the test ends, the containers of the daemon with these bind
// directories, with their volumes, and then an image.
func (m *machine) cleanUp(t testing.TB, binds, imageRef string) {
	t.Cleanup(func() {
		for _, c := range m.containers(t, binds) {
			options := container.RemoveOptions{Force: true, RemoveVolumes: true}
			if err := m.engine.ContainerRemove(context.Background(), c.ID, options); err != nil && !errdefs.IsNotFound(err) {
				t.Error(err)
			}
		}
		if imageRef == "" {
			return
		}
		options := image.RemoveOptions{Force: true, PruneChildren: true}
		if _, err := m.engine.ImageRemove(context.Background(), imageRef, options); err != nil && !errdefs.IsNotFound(err) {
			t.Error(err)
		}
	})
}

// containers returns what a daemon has on the engine, unfinished ones included.
func (m *machine) containers(t testing.TB, binds string) []container.Summary {
	t.Helper()
	list, err := m.engine.ContainerList(context.Background(), container.ListOptions{
		All: true, Filters: filters.NewArgs(filters.Arg("label", labelBinds+"="+binds))})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// wantNothing fails the test unless the daemon has no container and no directory.
func (m *machine) wantNothing(t testing.TB) {
	t.Helper()
	for _, c := range m.containers(t, m.binds) {
		t.Errorf("there is a container %v", c.Names)
	}
	for _, name := range bindDirs(t, m.binds) {
		t.Errorf("there is a bind directory %s", name)
	}
}

// newID returns a service id that nobody else uses.
func newID() string { return "it-" + strings.ToLower(rand.Text()) }

// createAs asks for a service that runs the probe. Fields in extra replace its own.
func (m *machine) createAs(t testing.TB, id, extra string) answer {
	t.Helper()
	for _, field := range []string{fmt.Sprintf(`"image":%q`, m.image), `"cmd":["/probe","run","/data"]`} {
		if name, _, _ := strings.Cut(field, ":"); !strings.Contains(extra, name+":") {
			extra = field + "," + extra
		}
	}
	return m.do(t, "POST", "/service", createBodyJSON(id, strings.Trim(extra, ",")))
}

func (m *machine) create(t testing.TB, extra string) (id string) {
	t.Helper()
	id = newID()
	m.createAs(t, id, extra).want(t, http.StatusCreated)
	return id
}

func (m *machine) ctl(t testing.TB, id, op string) {
	t.Helper()
	m.do(t, "POST", "/service/"+id+"/ctl", `{"op":"`+op+`"}`).want(t, http.StatusNoContent)
}

func (m *machine) setEnv(t testing.TB, id, body string) {
	t.Helper()
	m.do(t, "PATCH", "/service/"+id+"/env", body).want(t, http.StatusNoContent)
}

// get returns what GET says about a service.
func (m *machine) get(t testing.TB, id string) (c container.InspectResponse) {
	t.Helper()
	decode(t, m.do(t, "GET", "/service/"+id, "").want(t, http.StatusOK).body, &c)
	return c
}

func decode(t testing.TB, text string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		t.Fatalf("%v in %.200s", err, text)
	}
}

// report is what the probe says that it sees.
type report struct {
	Args, Env, Interfaces []string
	UID, GID              int
	Dir, Hostname         string
	Terminal              bool
	Status                string            // /proc/self/status
	Cgroup                map[string]string // limits, by the kernel's file name
	Files                 map[string]string // under the bind directory: owner, mode and content
	Starts                string            // a byte for each start that the volume has seen
	Stdin                 string            // its first line, or "EOF"
	Forks                 int               // that worked
}

// report waits for the probe's report and takes it away, so that the next is a new one.
func (m *machine) report(t testing.TB, id string) (r report) {
	t.Helper()
	path := filepath.Join(m.binds, id, "report.json")
	waitFor(t, "the probe's report", func() bool { _, err := os.Stat(path); return err == nil })
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	decode(t, string(text), &r)
	return r
}

// status returns a line of the probe's /proc/self/status.
func (r report) status(name string) string {
	for line := range strings.Lines(r.Status) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// limit returns what the kernel's first or, with version 2 of cgroups, second file says.
func (r report) limit(v1, v2 string) string {
	text, ok := r.Cgroup[v1]
	if !ok {
		text = r.Cgroup[v2]
	}
	return strings.TrimSpace(text)
}

func TestServiceRunsAsAsked(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := m.create(t, `"cmd":["/probe","run","/srv/a b","$HOME","two words",""],"shell":["/bin/x","-c"],
		"bind_dir":"srv/a b/","user":"1234:2345","working_dir":"/opt/here","hostname":"Named-1","env":["A=1","B=x=y z"],
		"tty":false,"network_disabled":true,"max_cpu":25000,"max_ram":67108864`)
	m.ctl(t, id, "start")
	r, c := m.report(t, id), m.get(t, id)

	for _, check := range []struct {
		what      string
		got, want any
	}{
		{"cmd", r.Args, []string{"/probe", "run", "/srv/a b", "$HOME", "two words", ""}},
		{"shell", []string(c.Config.Shell), []string{"/bin/x", "-c"}},
		{"user", [2]int{r.UID, r.GID}, [2]int{1234, 2345}},
		{"working_dir", r.Dir, "/opt/here"},
		{"hostname", r.Hostname, "Named-1"},
		{"env A", slices.Contains(r.Env, "A=1"), true},
		{"env B", slices.Contains(r.Env, "B=x=y z"), true},
		{"tty", r.Terminal, false},
		{"network_disabled", r.Interfaces, []string{"lo"}},
		{"max_cpu", r.limit("cpu.cfs_quota_us", "cpu.max"), cmp.Or(r.onV2("25000 100000"), "25000")},
		{"its period", r.limit("cpu.cfs_period_us", "cpu.max"), cmp.Or(r.onV2("25000 100000"), "100000")},
		{"max_ram", r.limit("memory.limit_in_bytes", "memory.max"), "67108864"},
		{"no swap on top", c.HostConfig.MemorySwap, int64(67108864)},
		{"bind directory's owner", strings.HasPrefix(r.Files["."], "1234:2345 "), true},
		{"no_new_privs", r.status("NoNewPrivs"), "1"},
		{"no capability as another user", r.status("CapEff"), "0000000000000000"},
	} {
		if fmt.Sprint(check.got) != fmt.Sprint(check.want) {
			t.Errorf("%s: the service has %v, want %v", check.what, check.got, check.want)
		}
	}
	for file, want := range map[string]string{"memory.memsw.limit_in_bytes": "67108864", "memory.swap.max": "0"} {
		// Neither is there where the kernel does not account swap.
		if got, ok := r.Cgroup[file]; ok && strings.TrimSpace(got) != want {
			t.Errorf("%s is %q, want %s", file, got, want)
		}
	}
}

// onV2 returns text where the kernel has version 2 of cgroups.
func (r report) onV2(text string) string {
	if _, ok := r.Cgroup["cpu.max"]; ok {
		return text
	}
	return ""
}

func TestServiceThatAsksForNothingIsConfined(t *testing.T) {
	t.Parallel()
	m := newMachine(t, func(c *config) { c.pidsLimit = 77 })
	id := m.create(t, "")
	m.ctl(t, id, "start")
	r, c := m.report(t, id), m.get(t, id)
	// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, NET_BIND_SERVICE, SYS_CHROOT
	const capabilities = "00000000000404fb"

	for _, check := range []struct {
		what      string
		got, want any
	}{
		{"user", [2]int{r.UID, r.GID}, [2]int{0, 0}},
		{"working directory", r.Dir, "/"},
		{"hostname", r.Hostname, c.ID[:12]},
		{"tty", r.Terminal, true},
		{"stdin", c.Config.OpenStdin, true},
		{"network", r.Interfaces, []string{"lo", "eth0"}},
		{"CPU quota", r.limit("cpu.cfs_quota_us", "cpu.max"), cmp.Or(r.onV2("max 100000"), "-1")},
		{"pids limit", r.limit("pids.max", "pids.max"), "77"},
		{"bounding capabilities", r.status("CapBnd"), capabilities},
		{"effective capabilities", r.status("CapEff"), capabilities},
		{"permitted capabilities", r.status("CapPrm"), capabilities},
		{"no_new_privs", r.status("NoNewPrivs"), "1"},
		{"seccomp filter", r.status("Seccomp"), "2"},
		{"bind directory's owner", strings.HasPrefix(r.Files["."], "0:0 "), true},
	} {
		if fmt.Sprint(check.got) != fmt.Sprint(check.want) {
			t.Errorf("%s: the service has %v, want %v", check.what, check.got, check.want)
		}
	}
}

func TestStdinIsOpenOrClosed(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for _, test := range []struct {
		extra string
		send  string
		want  string
	}{
		{`"tty":true`, "over the terminal\n", "over the terminal\n"},
		{`"tty":false,"open_stdin":true`, "over a pipe\n", "over a pipe\n"},
		{`"tty":false,"open_stdin":false`, "", "EOF"},
	} {
		t.Run(test.extra, func(t *testing.T) {
			t.Parallel()
			id := m.create(t, `"cmd":["/probe","stdin","/data"],`+test.extra)
			if test.send != "" {
				attached, err := m.engine.ContainerAttach(t.Context(), id, container.AttachOptions{Stream: true, Stdin: true})
				if err != nil {
					t.Fatal(err)
				}
				defer attached.Close()
				m.ctl(t, id, "start")
				if _, err := io.WriteString(attached.Conn, test.send); err != nil {
					t.Fatal(err)
				}
			} else {
				m.ctl(t, id, "start")
			}
			if got := m.report(t, id).Stdin; got != test.want {
				t.Errorf("the service read %q, want %q", got, test.want)
			}
		})
	}
}

func TestPublishedPortsAnswerFromTheHost(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for name, test := range map[string]struct {
		ports  string // of TCP port 8080 and UDP port 8081
		chosen bool   // by the engine
	}{
		"object, chosen port": {`"8080/tcp":{"HostIp":"127.0.0.1","HostPort":"0"},"8081/udp":{"HostIp":"127.0.0.1","HostPort":"0"}`, true},
		"array, chosen port":  {`"8080/tcp":[{"HostIp":"127.0.0.1","HostPort":"0"}],"8081/udp":[{"HostPort":"0"}]`, true},
		"array of two":        {`"8080/tcp":[{"HostIp":"127.0.0.1","HostPort":"TCP"},{"HostIp":"127.0.0.1","HostPort":"0"}],"8081/udp":{"HostIp":"127.0.0.1","HostPort":"UDP"}`, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tcp, udp := freePorts(t)
			id := m.create(t, `"port_map":{`+strings.NewReplacer("TCP", tcp, "UDP", udp).Replace(test.ports)+`}`)
			m.ctl(t, id, "start")
			m.report(t, id)
			published := m.get(t, id).NetworkSettings.Ports
			for port, answer := range map[nat.Port]string{"8080/tcp": "tcp hello\n", "8081/udp": "udp hello\n"} {
				if len(published[port]) == 0 {
					t.Errorf("%s is not published: %v", port, published)
				}
				for _, end := range published[port] {
					if end.HostIP == "::" { // the engine adds it to "all addresses"
						continue
					}
					if got := ask(t, port.Proto(), net.JoinHostPort("127.0.0.1", end.HostPort)); got != answer {
						t.Errorf("%s at %v: the host reads %q, want %q", port, end, got, answer)
					}
				}
			}
			if slices.Contains(published["8080/tcp"], nat.PortBinding{HostIP: "127.0.0.1", HostPort: tcp}) == test.chosen {
				t.Errorf("published at %v, want 127.0.0.1 and the port asked for, %s", published, tcp)
			}
		})
	}
}

// freePorts returns a TCP and a UDP port of the host that nobody uses.
func freePorts(t testing.TB) (tcp, udp string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer packets.Close()
	_, tcp, _ = net.SplitHostPort(listener.Addr().String())
	_, udp, _ = net.SplitHostPort(packets.LocalAddr().String())
	return tcp, udp
}

// ask sends a line and returns the answer.
func ask(t testing.TB, network, address string) string {
	t.Helper()
	conn, err := net.DialTimeout(network, address, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(conn, "hello\n"); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		t.Error(err)
	}
	return line
}

func TestMemoryHogIsKilled(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := m.create(t, `"cmd":["/probe","hog","/data"],"max_ram":33554432`)
	m.ctl(t, id, "start")
	m.waitForEnd(t, id)
	if state := m.get(t, id).State; !state.OOMKilled || state.ExitCode != 137 {
		t.Errorf("OOMKilled is %v, exit code %d, want true and 137", state.OOMKilled, state.ExitCode)
	}
}

// waitForEnd waits until the service has ended and returns its exit code.
func (m *machine) waitForEnd(t testing.TB, id string) int64 {
	t.Helper()
	ended, failed := m.engine.ContainerWait(t.Context(), id, container.WaitConditionNotRunning)
	select {
	case end := <-ended:
		return end.StatusCode
	case err := <-failed:
		t.Fatal(err)
		return 0
	}
}

func TestForkBombStopsAtThePidsLimit(t *testing.T) {
	t.Parallel()
	const limit = 60
	m := newMachine(t, func(c *config) { c.pidsLimit = limit })
	id := m.create(t, `"cmd":["/probe","forks","/data"]`)
	m.ctl(t, id, "start")
	// The probe has threads of its own: a few, not half of the limit.
	if forks := m.report(t, id).Forks; forks < limit/2 || forks >= limit {
		t.Errorf("the service could fork %d times, want fewer than %d", forks, limit)
	}
}

func TestBindDirectoryIsWrittenOnBothSides(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := m.create(t, "")
	if err := os.WriteFile(filepath.Join(m.binds, id, "from-host"), []byte("written outside"), 0o600); err != nil {
		t.Fatal(err)
	}
	m.ctl(t, id, "start")
	if got, want := m.report(t, id).Files["from-host"], "0:0 -rw------- written outside"; got != want {
		t.Errorf("the service sees %q, want %q", got, want)
	}
	if text, err := os.ReadFile(filepath.Join(m.binds, id, "from-container")); err != nil || string(text) != "written inside" {
		t.Errorf("the host reads %q, %v", text, err)
	}
}

func TestBindContentsArriveInTheService(t *testing.T) {
	t.Parallel()
	archive := gzipOf(t, imageOf(t,
		imageEntry{tar.Header{Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o750, Uid: 7, Gid: 8}, ""},
		imageFile("dir/program", "contents"),
		imageEntry{tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "dir/program", Uid: 7, Gid: 8}, ""}))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write(archive)
	}))
	t.Cleanup(server.Close)
	m := newMachine(t, func(c *config) { c.fetchAllow = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} })

	for user, owner := range map[string]string{"1234:2345": "1234:2345", "1234": "1234:0", "": "7:8"} {
		t.Run("user "+user, func(t *testing.T) {
			t.Parallel()
			id := m.create(t, fmt.Sprintf(`"user":%q,"bind_contents":"%s/a.tar.gz"`, user, server.URL))
			m.ctl(t, id, "start")
			files := m.report(t, id).Files
			for name, want := range map[string]string{"dir": "drwxr-x--- ", "dir/program": "-rwxr-xr-x contents", "link": "Lrwxrwxrwx "} {
				if want = owner + " " + want; files[name] != want {
					t.Errorf("%s: the service sees %q, want %q", name, files[name], want)
				}
			}
		})
	}
}

// imageWithVolume makes an image of the probe that declares a volume and a variable.
func (m *machine) imageWithVolume(t testing.TB) string {
	t.Helper()
	ref := "duxcore-test/" + newID() + ":1"
	archive := imageOf(t, imageFile("probe", buildProbe(t)))
	progress, err := m.engine.ImageImport(t.Context(), image.ImportSource{Source: bytes.NewReader(archive), SourceName: "-"}, ref,
		image.ImportOptions{Changes: []string{"VOLUME /vol", "ENV FROM_IMAGE=underneath"}})
	if err != nil {
		t.Fatal(err)
	}
	defer progress.Close()
	m.cleanUp(t, m.binds, ref)
	if text, err := io.ReadAll(progress); err != nil || !bytes.Contains(text, []byte("sha256:")) {
		t.Fatalf("cannot import: %s %v", text, err)
	}
	return ref
}

func TestEnvChangesAtTheNextStart(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := m.create(t, fmt.Sprintf(`"image":%q,"env":["ENV=first"],
		"user":"0:7","working_dir":"/vol","hostname":"kept","tty":false,"port_map":{"8080/tcp":{"HostPort":"0"}},"max_cpu":50000,"max_ram":67108864`, m.imageWithVolume(t)))
	starts := ""
	wantEnv := func(when string, env []string, want string) {
		t.Helper()
		got := slices.DeleteFunc(slices.Clone(env), func(v string) bool { return !strings.HasPrefix(v, "ENV") && v != "FROM_IMAGE=underneath" })
		slices.Sort(got)
		if strings.Join(got, " ") != want {
			t.Errorf("%s: the environment is %q, want %q", when, got, want)
		}
	}
	// The probe counts its starts in the volume, which must outlive each container.
	wantStarted := func(when, want string) {
		t.Helper()
		r := m.report(t, id)
		wantEnv(when+", in the service", r.Env, want)
		wantEnv(when+", in GET", m.get(t, id).Config.Env, want)
		if starts += "x"; r.Starts != starts {
			t.Errorf("%s: the volume holds %q, want %q", when, r.Starts, starts)
		}
	}

	m.ctl(t, id, "start")
	wantStarted("after the first start", "ENV=first FROM_IMAGE=underneath")
	first := m.get(t, id)
	m.setEnv(t, id, `{"ENV":"lost","ENV_LOST":"x"}`)
	wantEnv("with a change that waits", m.get(t, id).Config.Env, "ENV=first FROM_IMAGE=underneath")
	m.setEnv(t, id, `{"ENV":"second"}`)
	m.ctl(t, id, "start")
	if c := m.get(t, id); c.ID != first.ID || c.State.StartedAt != first.State.StartedAt {
		t.Error("start of a running service restarted it")
	}
	wantEnv("after a start of a running service", m.get(t, id).Config.Env, "ENV=first FROM_IMAGE=underneath")
	m.ctl(t, id, "restart")
	wantStarted("after the restart", "ENV=second FROM_IMAGE=underneath")
	if got, want := withoutEnv(t, m.get(t, id)), withoutEnv(t, first); got != want {
		t.Errorf("more than the environment has changed:\n%s\n%s", want, got)
	}

	m.ctl(t, id, "stop")
	m.setEnv(t, id, `{"ENV":"third"}`)
	wantEnv("stopped", m.get(t, id).Config.Env, "ENV=second FROM_IMAGE=underneath")
	m.ctl(t, id, "start")
	wantStarted("after stop and start", "ENV=third FROM_IMAGE=underneath")

	m.setEnv(t, id, `{}`)
	m.ctl(t, id, "restart")
	wantStarted("without variables", "FROM_IMAGE=underneath")
	m.setEnv(t, id, `{"ENV":"never used"}`)
	if list := m.containers(t, m.binds); len(list) != 1 {
		t.Errorf("the service has %d containers", len(list))
	}

	volume := first.Mounts[slices.IndexFunc(first.Mounts, func(p container.MountPoint) bool { return p.Destination == "/vol" })].Name
	if _, err := m.engine.VolumeInspect(t.Context(), volume); err != nil {
		t.Errorf("the volume before the service is deleted: %v", err)
	}
	m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
	if _, err := m.engine.VolumeInspect(t.Context(), volume); !errdefs.IsNotFound(err) {
		t.Errorf("the volume after the service is deleted: %v", err)
	}
	m.wantNothing(t)
}

// withoutEnv returns a service's settings but for those in which its environment shows.
func withoutEnv(t testing.TB, c container.InspectResponse) string {
	t.Helper()
	c.Config.Env, c.Config.Image, c.HostConfig.VolumesFrom = nil, "", nil
	delete(c.Config.Labels, labelRevision)
	return toJSON(t, []any{c.Name, c.Image, c.Config, c.HostConfig})
}

func TestControlDoesWhatIsAskedAndNothingTwice(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := m.create(t, "")
	for i, step := range []struct {
		op       string
		running  bool
		restarts bool
	}{
		{"stop", false, false},
		{"kill", false, false},
		{"start", true, true},
		{"start", true, false},
		{"restart", true, true},
		{"stop", false, false},
		{"stop", false, false},
		{"restart", true, true},
		{"kill", false, false},
		{"kill", false, false},
		{"start", true, true},
	} {
		before := m.get(t, id).State
		m.ctl(t, id, step.op)
		waitFor(t, "the service's state", func() bool { return m.get(t, id).State.Running == step.running })
		after := m.get(t, id).State
		if restarted := after.StartedAt != before.StartedAt; restarted != step.restarts {
			t.Errorf("step %d, %s: started anew is %v, want %v", i, step.op, restarted, step.restarts)
		}
		if stopped := step.op == "stop" && before.Running; stopped && after.ExitCode != 0 {
			t.Errorf("step %d: the service was not stopped by SIGTERM but ended with %d", i, after.ExitCode)
		}
		if killed := step.op == "kill" && before.Running; killed && after.ExitCode != 137 {
			t.Errorf("step %d: the service was not killed but ended with %d", i, after.ExitCode)
		}
		if step.restarts {
			m.report(t, id) // it has its signal handlers by now
		}
	}
}

func TestKillDoesNotWaitBehindAStop(t *testing.T) {
	t.Parallel()
	m := newMachine(t, func(c *config) { c.stopTimeout = time.Hour })
	id := m.create(t, `"cmd":["/probe","stubborn","/data"]`)
	m.ctl(t, id, "start")
	m.report(t, id)

	stop := m.request(t, "POST", "/service/"+id+"/ctl", strings.NewReader(`{"op":"stop"}`))
	stopped := make(chan string, 1)
	go func() {
		response, err := m.client.Do(stop)
		if err != nil {
			stopped <- err.Error()
			return
		}
		response.Body.Close()
		stopped <- response.Status
	}()
	waitFor(t, "SIGTERM at the service", func() bool {
		_, err := os.Stat(filepath.Join(m.binds, id, "terminated"))
		return err == nil
	})
	select {
	case status := <-stopped:
		t.Fatalf("the stop ended with %s before the kill: the test shows nothing", status)
	default:
	}
	m.ctl(t, id, "kill") // would take the hour, and fail, behind the stop
	if status := <-stopped; status != "204 No Content" {
		t.Errorf("the stop ended with %s", status)
	}
	if state := m.get(t, id).State; state.Running || state.ExitCode != 137 {
		t.Errorf("running is %v, exit code %d, want killed", state.Running, state.ExitCode)
	}
}

func TestStatsAreCompleteAndAnswerForStoppedServices(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := m.create(t, "")
	stats := func() (s container.StatsResponse) {
		decode(t, m.do(t, "GET", "/service/"+id+"/stats", "").want(t, http.StatusOK).body, &s)
		return s
	}
	if s := stats(); s.Name != "/"+id || !s.Read.IsZero() {
		t.Errorf("stats of a service that does not run: %+v", s)
	}
	m.ctl(t, id, "start")
	if s := stats(); s.Name != "/"+id || s.PreRead.IsZero() || !s.Read.After(s.PreRead) || s.PreCPUStats.SystemUsage == 0 ||
		s.MemoryStats.Usage == 0 || s.PidsStats.Current == 0 || len(s.Networks) == 0 {
		t.Errorf("stats of a running service are not complete: %+v", s)
	}
	m.ctl(t, id, "stop")
	if s := stats(); s.Name != "/"+id || !s.Read.IsZero() {
		t.Errorf("stats of a stopped service: %+v", s)
	}
}

func TestGetIsTheEnginesInspect(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := m.create(t, "")
	for _, op := range []string{"", "start", "stop"} {
		if op != "" {
			m.ctl(t, id, op)
		}
		got := m.do(t, "GET", "/service/"+id, "").want(t, http.StatusOK).body
		if _, want, err := m.engine.ContainerInspectWithRaw(t.Context(), id, false); err != nil || got != string(want) {
			t.Errorf("after %q: got %s, want %s, %v", op, got, want, err)
		}
	}
}

func TestListShowsOnlyThisDaemonsServices(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	other := &machine{daemon: startDaemon(t, "", nil), engine: m.engine, image: m.image}
	other.cleanUp(t, other.binds, "")
	mine := []string{m.create(t, ""), m.create(t, "")}
	theirs := []string{other.create(t, "")}
	m.foreign(t, newID(), nil)

	for d, want := range map[*machine][]string{m: mine, other: theirs} {
		var list []container.Summary
		decode(t, d.do(t, "GET", "/service", "").want(t, http.StatusOK).body, &list)
		var got []string
		for _, c := range list {
			got = append(got, strings.TrimPrefix(strings.Join(c.Names, " "), "/"))
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("the list shows %q, want %q", got, want)
		}
	}
}

// foreign runs the probe in a container that no daemon made and returns its id.
func (m *machine) foreign(t testing.TB, name string, labels map[string]string, mounts ...string) string {
	t.Helper()
	host := &container.HostConfig{NetworkMode: "none"}
	for _, dir := range mounts {
		host.Mounts = append(host.Mounts, mount.Mount{Type: mount.TypeBind, Source: dir, Target: "/data"})
	}
	created, err := m.engine.ContainerCreate(t.Context(), &container.Config{Image: m.image, Labels: labels,
		Cmd: []string{"/probe", "run", "/tmp"}, WorkingDir: "/tmp"}, host, nil, nil, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := m.engine.ContainerRemove(context.Background(), created.ID, container.RemoveOptions{Force: true})
		if err != nil && !errdefs.IsNotFound(err) {
			t.Error(err)
		}
	})
	if err := m.engine.ContainerStart(t.Context(), created.ID, container.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	return created.ID
}

func TestForeignContainersAreNotFoundAndUntouched(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	byName, forged, misnamed := newID(), newID(), newID()
	byPrefix := m.foreign(t, newID(), nil)
	targets := map[string]string{ // ids of containers by what a request calls them
		byName:        m.foreign(t, byName, nil),
		forged:        m.foreign(t, forged, map[string]string{labelService: forged, labelBinds: m.binds + "/other"}),
		misnamed:      m.foreign(t, misnamed, map[string]string{labelService: "it-another", labelBinds: m.binds}),
		byPrefix[:12]: byPrefix,
		byPrefix[:63]: byPrefix,
	}
	inspect := func(containerID string) string {
		_, raw, err := m.engine.ContainerInspectWithRaw(t.Context(), containerID, false)
		if err != nil {
			t.Error(err)
		}
		return string(raw)
	}
	before := map[string]string{}
	for _, containerID := range targets {
		before[containerID] = inspect(containerID)
	}
	for name, containerID := range targets {
		for _, request := range []struct{ method, path, body string }{
			{"GET", "", ""}, {"GET", "/stats", ""}, {"PATCH", "/env", `{"A":"1"}`},
			{"POST", "/ctl", `{"op":"start"}`}, {"POST", "/ctl", `{"op":"stop"}`},
			{"POST", "/ctl", `{"op":"restart"}`}, {"POST", "/ctl", `{"op":"kill"}`}, {"DELETE", "", ""},
		} {
			m.do(t, request.method, "/service/"+name+request.path, request.body).want(t, http.StatusNotFound, "no service")
		}
		if after := inspect(containerID); after != before[containerID] {
			t.Errorf("container %s was touched:\n%s\n%s", name, before[containerID], after)
		}
	}
	m.createAs(t, byName, "").want(t, http.StatusConflict)
	if after := inspect(targets[byName]); after != before[targets[byName]] {
		t.Error("a create of its name touched a container")
	}
	if left := bindDirs(t, m.binds); len(left) != 0 {
		t.Errorf("there are bind directories: %q", left)
	}
}

func TestTakenIDIsAConflict(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := m.create(t, `"env":["WHOSE=first"]`)
	before := m.get(t, id)
	m.createAs(t, id, `"env":["WHOSE=second"]`).want(t, http.StatusConflict)
	if after := m.get(t, id); after.ID != before.ID || !slices.Contains(after.Config.Env, "WHOSE=first") {
		t.Error("the second create touched the service")
	}
	if _, err := os.Stat(filepath.Join(m.binds, id)); err != nil {
		t.Error(err)
	}
}

func TestBindDirectoryWithDataIsNeitherUsedNorErased(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := newID()
	data := filepath.Join(m.binds, id, "data")
	writeFile(t, data, "precious")
	m.createAs(t, id, "").want(t, http.StatusConflict, "not empty")
	wantFile(t, data, "precious")
	if list := m.containers(t, m.binds); len(list) != 0 {
		t.Errorf("there are containers: %v", list)
	}

	// The operator moves it away; an empty leftover is no obstacle.
	if err := os.Remove(data); err != nil {
		t.Fatal(err)
	}
	m.createAs(t, id, "").want(t, http.StatusCreated)
}

// writeFile writes a file and makes the directories that it is in.
func writeFile(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func wantFile(t testing.TB, path, content string) {
	t.Helper()
	if text, err := os.ReadFile(path); err != nil || string(text) != content {
		t.Errorf("%s holds %q, %v, want %q", path, text, err, content)
	}
}

func TestDeleteRemovesWhatIsLeft(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for name, lose := range map[string]func(t testing.TB, id string){
		"nothing is lost": func(t testing.TB, id string) {},
		"the directory is lost": func(t testing.TB, id string) {
			if err := os.RemoveAll(filepath.Join(m.binds, id)); err != nil {
				t.Fatal(err)
			}
		},
		"the container is lost": func(t testing.TB, id string) {
			if err := m.engine.ContainerRemove(t.Context(), id, container.RemoveOptions{Force: true}); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			id := m.create(t, "")
			m.ctl(t, id, "start")
			m.report(t, id)
			writeFile(t, filepath.Join(m.binds, id, "dir/file"), "")
			lose(t, id)
			m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
			m.wantNothing(t)
			m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNotFound)
		})
	}
}

func TestFailedCreateLeavesNothing(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write(gzipOf(t, imageOf(t, imageFile("a", "x"), imageFile("../b", "y"))))
	}))
	t.Cleanup(server.Close)
	m := newMachine(t, func(c *config) { c.fetchAllow = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} })
	for name, test := range map[string]struct {
		extra  string
		status int
	}{
		"an image without a command": {`"cmd":[]`, http.StatusBadRequest},
		"hostile contents":           {fmt.Sprintf(`"bind_contents":"%s"`, server.URL), http.StatusBadRequest},
		"no such image":              {`"image":"sha256:` + strings.Repeat("0", 64) + `"`, http.StatusNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			m.createAs(t, newID(), test.extra).want(t, test.status)
			m.wantNothing(t)
		})
	}
}

func TestImportsKeepTagsOfTheirOwn(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for _, marker := range []string{newID(), newID()} {
		id := m.importImage(t, string(imageOf(t, imageFile(marker, marker))))
		m.cleanUp(t, m.binds, id)
		inspected, err := m.engine.ImageInspect(t.Context(), id)
		if want := []string{"duxcore/import:" + id[len("sha256:"):][:12]}; err != nil || !slices.Equal(inspected.RepoTags, want) {
			t.Errorf("the image's tags are %q, %v, want %q", inspected.RepoTags, err, want)
		}
		if got := m.holding(t, marker); !slices.Equal(got, []string{id}) {
			t.Errorf("images that hold what was uploaded: %q, want %q", got, id)
		}
	}
}

// imagesWith returns the ids of the images of which layers, all that is in their layers, is true.
func (m *machine) imagesWith(t testing.TB, layers func(string) bool) (ids []string) {
	t.Helper()
	for _, found := range allImages(t, m.engine) {
		// Larger or older ones are not this test's. Others' images may go meanwhile.
		if found.Size > 1<<20 || time.Since(time.Unix(found.Created, 0)) > time.Hour {
			continue
		}
		saved, err := m.engine.ImageSave(t.Context(), []string{found.ID})
		if err != nil {
			continue
		}
		text, err := inLayers(saved)
		saved.Close()
		if err == nil && layers(text) {
			ids = append(ids, found.ID)
		}
	}
	return ids
}

// allImages lists the engine's images. With containerd's store that is a 404 while another test removes one.
func allImages(t testing.TB, engine *client.Client) (all []image.Summary) {
	t.Helper()
	waitFor(t, "a list of images", func() bool {
		var err error
		all, err = engine.ImageList(context.Background(), image.ListOptions{All: true})
		if err != nil && !errdefs.IsNotFound(err) {
			t.Fatal(err)
		}
		return err == nil
	})
	return all
}

// inLayers returns the names and contents of all files in the layers of a saved image: archives in
// an archive, which some engines compress.
func inLayers(saved io.Reader) (string, error) {
	var all strings.Builder
	outer := tar.NewReader(saved)
	for {
		if _, err := outer.Next(); err == io.EOF {
			return all.String(), nil
		} else if err != nil {
			return "", err
		}
		blob := bufio.NewReader(outer)
		layer := tar.NewReader(blob)
		if start, _ := blob.Peek(2); string(start) == "\x1f\x8b" {
			unzipped, err := gzip.NewReader(blob)
			if err != nil {
				return "", err
			}
			layer = tar.NewReader(unzipped)
		}
		for header, err := layer.Next(); err == nil; header, err = layer.Next() { // its end, or no archive
			all.WriteString(header.Name)
			io.Copy(&all, layer)
		}
	}
}

// holding returns the ids of the images made by importing something with marker in it.
func (m *machine) holding(t testing.TB, marker string) (ids []string) {
	t.Helper()
	return m.imagesWith(t, func(layers string) bool { return strings.Contains(layers, marker) })
}

func TestFailedImportLeavesNoImage(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	marker := newID()
	archive := string(imageOf(t, imageFile("first-"+marker, strings.Repeat(marker, 2000)), imageFile("second-"+marker, strings.Repeat(marker, 100))))
	end := strings.TrimRight(archive, "\x00") // the end of the second file's content
	lastBlock := (len(end) + 511) / 512 * 512
	isEmpty := func(layers string) bool { return layers == "" }
	earlier := m.imagesWith(t, isEmpty)
	for name, body := range map[string]string{
		"empty":                        "",
		"zeros":                        strings.Repeat("\x00", 10240),
		"text":                         strings.Repeat("not a tar "+marker, 200),
		"gzipped":                      string(gzipOf(t, []byte(archive))),
		"cut in the first header":      archive[:300],
		"cut after the first header":   archive[:512],
		"cut in the first content":     archive[:20_000],
		"cut in the second header":     archive[:strings.Index(archive, "second-")+200],
		"cut in the second content":    archive[:len(end)-1000],
		"cut in the padding":           archive[:lastBlock-1],
		"cut before the end mark":      archive[:lastBlock],
		"cut in the end mark":          archive[:lastBlock+512],
		"broken in the second header":  strings.Replace(archive, "second-", "broken-", 1),
		"another archive behind it":    archive + archive,
		"a gzip stream too":            tarAndGzip(t, archive),
		"a sparse file of 100 GB":      fileOfHoles(100 << 30),
		"something else after a while": archive[:lastBlock] + strings.Repeat("rubbish!", 64) + strings.Repeat("\x00", 1024),
	} {
		t.Run(name, func(t *testing.T) { m.do(t, "POST", "/docker/image", body).want(t, http.StatusBadRequest) })
	}
	t.Run("cannot be unpacked", func(t *testing.T) {
		link := imageEntry{tar.Header{Name: "link", Typeflag: tar.TypeLink, Linkname: "nothing"}, ""}
		m.do(t, "POST", "/docker/image", string(imageOf(t, imageFile(marker, marker), link))).want(t, http.StatusBadRequest, `"archive_refused"`)
	})
	t.Run("broken off", func(t *testing.T) { m.breakOff(t, archive, 20_000) })
	t.Run("broken off before the end mark", func(t *testing.T) { m.breakOff(t, archive, lastBlock) })

	// An image of one of those would be complete by the time that a later one is.
	good := m.importImage(t, archive)
	m.cleanUp(t, m.binds, good)
	holding := m.holding(t, marker)
	if !slices.Contains(holding, good) {
		t.Errorf("the images that hold what was uploaded are %q, without %s", holding, good)
	}
	for _, id := range slices.Concat(holding, m.imagesWith(t, isEmpty)) {
		if id != good && !slices.Contains(earlier, id) {
			t.Errorf("a failed import left the image %s", id)
			m.cleanUp(t, m.binds, id)
		}
	}
}

// tarAndGzip returns a tar archive with one file that is a gzip stream of another archive too: the name
// begins as such a stream does, with a field that hides the rest of the header, and the content is what is compressed.
func tarAndGzip(t testing.TB, other string) string {
	zipped := gzipOf(t, []byte(other))[10:]                       // behind its header
	name := "\x1f\x8b\x08\x04aaaaaa" + string([]byte{0xf4, 0x01}) // 500 bytes more are hidden
	return string(imageOf(t, imageEntry{tar.Header{Name: name, Mode: 0o755, Size: int64(len(zipped)), Format: tar.FormatGNU}, string(zipped)}))
}

// loadImage gives the engine an image with any configuration, and returns its name.
func (m *machine) loadImage(t testing.TB, config string) string {
	t.Helper()
	name := "duxcore-test/" + newID() + ":1"
	layer := string(imageOf(t, imageFile("probe", buildProbe(t))))
	sum := sha256.Sum256([]byte(layer))
	image := fmt.Sprintf(`{"architecture":%q,"os":"linux","config":%s,"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`,
		runtime.GOARCH, config, sum)
	manifest := fmt.Sprintf(`[{"Config":"config.json","RepoTags":[%q],"Layers":["layer.tar"]}]`, name)
	answer, err := m.engine.ImageLoad(t.Context(), bytes.NewReader(imageOf(t,
		imageFile("manifest.json", manifest), imageFile("config.json", image), imageFile("layer.tar", layer))))
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	m.cleanUp(t, m.binds, name)
	if text, err := io.ReadAll(answer.Body); err != nil || !bytes.Contains(text, []byte(name)) {
		t.Fatalf("cannot load: %s %v", text, err)
	}
	return name
}

// What an image says of itself, its services do not get by that.
func TestImagesThatAskForMore(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for name, config := range map[string]string{
		"20 MB of labels":                  `{"Labels":{"a":"` + strings.Repeat("x", 20<<20) + `"}}`,
		"a working directory of runtime's": `{"WorkingDir":"/proc/self/fd/8"}`,
	} {
		t.Run(name, func(t *testing.T) {
			m.createAs(t, newID(), fmt.Sprintf(`"image":%q`, m.loadImage(t, config))).want(t, http.StatusBadRequest, "image: ")
			m.wantNothing(t)
		})
	}
	t.Run("the beginning of another's id", func(t *testing.T) {
		for _, prefix := range []string{m.image[7:9], m.image[7:70], m.image[:20]} {
			m.createAs(t, newID(), fmt.Sprintf(`"image":%q`, prefix)).want(t, http.StatusBadRequest, "image: ")
		}
		m.wantNothing(t)
	})
	t.Run("variables", func(t *testing.T) {
		ref := m.loadImage(t, `{"Env":["KEPT=1","TAKEN=2"]}`)
		id := m.create(t, fmt.Sprintf(`"image":%q,"env":["TAKEN","OWN=3"]`, ref))
		m.ctl(t, id, "start")
		env := m.report(t, id).Env
		slices.Sort(env)
		if text := strings.Join(env, " "); !strings.Contains(text, "KEPT=1") || !strings.Contains(text, "OWN=3") || strings.Contains(text, "TAKEN") {
			t.Errorf("it has %s", text)
		}
		m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
	})
	t.Run("a health check", func(t *testing.T) {
		ref := m.loadImage(t, `{"Healthcheck":{"Test":["CMD","/probe","run","/data"],"Interval":1}}`)
		id := m.create(t, fmt.Sprintf(`"image":%q`, ref))
		m.ctl(t, id, "start")
		m.setEnv(t, id, `{"A":"1"}`)
		m.ctl(t, id, "restart") // another container
		if c := m.get(t, id); !c.State.Running || c.State.Health != nil {
			t.Errorf("it runs: %v; its health is %+v", c.State.Running, c.State.Health)
		}
		m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
	})
}

func TestConnectionServesOnAfterAnUpload(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	good := string(imageOf(t, imageFile(newID(), "not empty: others look for empty images")))
	for name, body := range map[string]string{"whole": good, "cut": good[:1024], "no tar": strings.Repeat("x", 10_000)} {
		for range 10 {
			answer := m.do(t, "POST", "/docker/image", body)
			if answer.status == http.StatusCreated {
				m.cleanUp(t, m.binds, strings.Split(answer.body, `"`)[3])
			}
			if after := m.do(t, "GET", "/service", ""); after.status != http.StatusOK {
				t.Fatalf("%s: the upload's answer is %d, that of the next request %d %s", name, answer.status, after.status, after.body)
			}
		}
	}
}

// breakOff uploads the first bytes of an archive, closes the connection, and waits until
// the daemon is done with it.
func (m *machine) breakOff(t testing.TB, archive string, bytes int) {
	t.Helper()
	const line = `route="POST /docker/image"`
	before := strings.Count(m.log.String(), line)
	conn, err := net.Dial("tcp", strings.TrimPrefix(m.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "POST /docker/image HTTP/1.1\r\nHost: daemon\r\nX-Duxcore-CoreKey: %s\r\nContent-Length: %d\r\n\r\n%s",
		m.key, len(archive), archive[:bytes])
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the end of the upload", func() bool { return strings.Count(m.log.String(), line) > before })
}

// registry is the least that the engine needs to pull from.
type registry struct {
	address string
	login   string // user:password; empty for none
	objects map[string]blob
}

// blob is a manifest or other content, by the path's last element.
type blob struct{ kind, content string }

func newRegistry(t testing.TB, login string) *registry {
	r := &registry{login: login, objects: map[string]blob{}}
	server := httptest.NewServer(r)
	t.Cleanup(server.Close)
	r.address = strings.TrimPrefix(server.URL, "http://")
	return r
}

func (r *registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	user, password, _ := req.BasicAuth()
	if r.login != "" && user+":"+password != r.login {
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
		return
	}
	object, ok := r.objects[req.URL.Path[strings.LastIndex(req.URL.Path, "/")+1:]]
	if req.URL.Path != "/v2/" && !ok {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		io.WriteString(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown","detail":{}}]}`)
		return
	}
	w.Header().Set("Content-Type", object.kind)
	w.Header().Set("Docker-Content-Digest", digest(object.content))
	w.Header().Set("Content-Length", strconv.Itoa(len(object.content)))
	io.WriteString(w, object.content)
}

func digest(content string) string { return fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(content))) }

func (r *registry) add(kind, content string) map[string]any {
	r.objects[digest(content)] = blob{kind, content}
	return map[string]any{"mediaType": kind, "digest": digest(content), "size": len(content)}
}

// push puts an image of the layers, which are tar archives, under a tag. It returns the
// image's name and its layers' digests.
func (r *registry) push(t testing.TB, tag string, layers ...[]byte) (name string, digests []string) {
	t.Helper()
	var diffs []string
	var descriptors []any
	for _, layer := range layers {
		diffs = append(diffs, digest(string(layer)))
		zipped := string(gzipOf(t, layer))
		digests = append(digests, digest(zipped))
		descriptors = append(descriptors, r.add("application/vnd.docker.image.rootfs.diff.tar.gzip", zipped))
	}
	const manifest = "application/vnd.docker.distribution.manifest.v2+json"
	config := r.add("application/vnd.docker.container.image.v1+json", toJSON(t, map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "config": map[string]any{"Cmd": []string{"/probe", "run", "/data"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffs}}))
	r.objects[tag] = blob{manifest, toJSON(t, map[string]any{"schemaVersion": 2, "mediaType": manifest, "config": config, "layers": descriptors})}
	r.add(manifest, r.objects[tag].content) // the engine asks for the tag, then for what it means
	return r.address + "/duxcore-test/probe:" + tag, digests
}

func toJSON(t testing.TB, v any) string {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestImageIsPulledFromARegistry(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for name, test := range map[string]struct{ login, auth string }{
		"open":         {"", ""},
		"with a login": {"someone:secret", `{"username":"someone","password":"secret"}`},
	} {
		r := newRegistry(t, test.login)
		ref, _ := r.push(t, "good", imageOf(t, imageFile("probe", buildProbe(t))), imageOf(t, imageFile(newID(), "")))
		m.cleanUp(t, m.binds, ref)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			id := newID()
			m.createFrom(t, id, ref, test.auth).want(t, http.StatusCreated)
			m.ctl(t, id, "start")
			if args := m.report(t, id).Args; !slices.Equal(args, []string{"/probe", "run", "/data"}) {
				t.Errorf("the service runs %q, want the image's command", args)
			}
		})
	}
}

// createFrom asks for a service of an image to be pulled, with its own command.
func (m *machine) createFrom(t testing.TB, id, ref, auth string) answer {
	t.Helper()
	r := m.request(t, "POST", "/service", strings.NewReader(createBodyJSON(id, fmt.Sprintf(`"image":%q`, ref))))
	if auth != "" {
		r.Header.Set("X-Registry-Auth", base64.URLEncoding.EncodeToString([]byte(auth)))
	}
	return m.send(t, r)
}

func TestFailedPullIsAnErrorAndLeavesNothing(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	open, closed := newRegistry(t, ""), newRegistry(t, "someone:secret")
	missing := open.address + "/duxcore-test/probe:missing"
	// The engine notices when it has most of the image, in an answer that began with 200.
	spoiled, layers := open.push(t, "spoiled", imageOf(t, imageFile(newID(), "")), imageOf(t, imageFile(newID(), strings.Repeat("x", 1<<16))))
	last := open.objects[layers[1]]
	last.content = last.content[:len(last.content)-1] + "?"
	open.objects[layers[1]] = last
	lacking, layers := open.push(t, "lacking", imageOf(t, imageFile(newID(), "")), imageOf(t, imageFile(newID(), "")))
	delete(open.objects, layers[1])
	secret, _ := closed.push(t, "secret", imageOf(t, imageFile(newID(), "")))

	for name, test := range map[string]struct {
		ref, auth string
		status    int
		says      string // a pattern of what 20.10 says, and later engines
	}{
		"no such tag":          {missing, "", http.StatusNotFound, "missing"},
		"a layer is broken":    {spoiled, "", http.StatusBadGateway, "verification failed|unexpected commit digest"},
		"a layer is not there": {lacking, "", http.StatusBadGateway, "unknown|from remote: not found"},
		"no login":             {secret, "", http.StatusBadGateway, "no basic auth|unauthorized"},
		"a wrong login":        {secret, `{"username":"someone","password":"guess"}`, http.StatusBadGateway, "auth|401 Unauthorized"},
	} {
		t.Run(name, func(t *testing.T) {
			m.cleanUp(t, m.binds, test.ref)
			answer := m.createFrom(t, newID(), test.ref, test.auth).want(t, test.status)
			if !regexp.MustCompile(test.says).MatchString(answer.body) {
				t.Errorf("body %s, want %s in it", answer.body, test.says)
			}
			if strings.Contains(answer.body, "guess") {
				t.Errorf("the error shows the password: %s", answer.body)
			}
			if _, err := m.engine.ImageInspect(t.Context(), test.ref); !errdefs.IsNotFound(err) {
				t.Errorf("the image: %v", err)
			}
			m.wantNothing(t)
		})
	}
}

func TestTwoDaemonsNeverShareBinds(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := m.create(t, "")
	cfg, err := parseConfig([]string{"-addr", "127.0.0.1:0", "-binds", m.binds, "-corekey", filepath.Join(t.TempDir(), "corekey.bin")},
		nil, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err = run(ctx, cfg, slog.New(slog.DiscardHandler), func(net.Addr) { cancel() })
	if err == nil || !strings.Contains(err.Error(), "in use by another daemon") {
		t.Errorf("the second daemon ended with %v", err)
	}
	m.get(t, id)
}

func TestDeeplyNestedTreeIsDeleted(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := m.create(t, `"cmd":["/probe","nest","/data","60000"]`)
	m.ctl(t, id, "start")
	if code := m.waitForEnd(t, id); code != 0 {
		t.Fatalf("the probe ended with %d", code)
	}
	m.client.Timeout = 0 // a busy disk takes minutes
	m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
	m.wantNothing(t)
}

func TestDeleteNeverFollowsALinkThatACustomerSwapsIn(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	canary := t.TempDir()
	inside := map[string]string{"top": "intact", "sub/f1": "intact", "sub/deep/f2": "intact"}
	for name, content := range inside {
		writeFile(t, filepath.Join(canary, name), content)
	}
	relative, err := filepath.Rel(filepath.Join(m.binds, "id"), canary)
	if err != nil {
		t.Fatal(err)
	}
	for i, target := range slices.Repeat([]string{canary, relative}, 5) {
		t.Run(fmt.Sprintf("round %d", i), func(t *testing.T) {
			t.Parallel()
			id := m.create(t, fmt.Sprintf(`"cmd":["/probe","swap","/data",%q]`, target))
			m.ctl(t, id, "start")
			m.report(t, id)
			m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
			if _, err := os.Lstat(filepath.Join(m.binds, id)); !os.IsNotExist(err) {
				t.Errorf("the bind directory: %v", err)
			}
			for name, content := range inside {
				wantFile(t, filepath.Join(canary, name), content)
			}
		})
	}
}

// consoleRun starts a service with the probe in a mode, and follows what it prints.
func (m *machine) consoleRun(t *testing.T, mode, extra string) (id string, l logStream) {
	t.Helper()
	id = m.create(t, fmt.Sprintf(`"cmd":["/probe",%q,"/data","40000"],%s`, mode, extra))
	m.ctl(t, id, "start")
	return id, logsOpen(t, m.daemon, "/service/"+id+"/logs?follow=true")
}

// recorded returns what a service in the mode "record" has read.
func (m *machine) recorded(t testing.TB, id string) string {
	text, err := os.ReadFile(filepath.Join(m.binds, id, "stdin"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(text)
}

// wantRecorded waits until a service has read as much as the text, and compares.
func (m *machine) wantRecorded(t testing.TB, id, text string) {
	t.Helper()
	waitFor(t, "what the service reads", func() bool { return len(m.recorded(t, id)) >= len(text) })
	if got := m.recorded(t, id); got != text {
		t.Fatalf("the service has read %d bytes, ending with %q, of %d, ending with %q", len(got), consoleTail(got), len(text), consoleTail(text))
	}
}

func (m *machine) stdin(t testing.TB, id, text string) answer {
	t.Helper()
	return m.do(t, "POST", "/service/"+id+"/stdin", text)
}

func TestShellOnATTYIsDrivenThroughTheConsole(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id, l := m.consoleRun(t, "shell", `"tty":true`)
	l.wait(t, "ready")
	r := stdinOpen(t, m.daemon, id)
	for i := range 20 {
		fmt.Fprintf(r, "say word %d\r", i)
		l.wait(t, fmt.Sprintf("<word %d>\r\n", i))
	}
	for _, size := range []string{"24x80", "1x1", "65535x65535", "50x132"} {
		rows, cols, _ := strings.Cut(size, "x")
		m.do(t, "POST", "/service/"+id+"/tty", fmt.Sprintf(`{"rows":%s,"cols":%s}`, rows, cols)).want(t, 204)
		l.wait(t, "size "+size+"\r\n")
	}
	io.WriteString(r, "sayx\x7f one\x15say two\n") // the tty edits the line
	l.wait(t, "<two>\r\n")
	io.WriteString(r, "exit\n")
	if err := l.end(t); err != nil {
		t.Errorf("the logs ended with %v", err)
	}
	io.WriteString(r, "say nothing\n")
	if a := r.answer(t); a.status != 409 {
		t.Errorf("after its end: %d %s", a.status, a.body)
	}
	m.do(t, "POST", "/service/"+id+"/tty", `{"rows":24,"cols":80}`).want(t, 409)
	if a := m.do(t, "GET", "/service/"+id+"/logs", "").want(t, 200); a.body != l.text.String() {
		t.Errorf("logs %q, followed %q", a.body, l.text)
	}
}

// A prompt ends no line: the engine logs it with the rest of that.
func TestPromptComesWithTheRestOfItsLine(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for _, tty := range []bool{true, false} {
		id, l := m.consoleRun(t, "shell", fmt.Sprintf(`"tty":%v`, tty))
		l.wait(t, "ready")
		m.stdin(t, id, "prompt\n").want(t, 204)
		m.stdin(t, id, "say the rest\n").want(t, 204)
		l.wait(t, "<the rest>")
		if text := l.text.String(); !strings.Contains(text, "$ ") {
			t.Errorf("%q has no prompt", text)
		}
	}
}

func TestOutputsOfAServiceWithoutTTY(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id, l := m.consoleRun(t, "both", `"tty":false`)
	var out, errs []string
	for i := range 500 {
		out, errs = append(out, fmt.Sprintf("out %d", i)), append(errs, fmt.Sprintf("err %d", i))
	}
	// The engine keeps what ends no line until more comes or the service ends, and does not
	// always send that to who follows.
	l.wait(t, "out 499\n")
	l.wait(t, "err 499\n")
	wantLines := func(query string, prefix string, want []string) {
		t.Helper()
		a := m.do(t, "GET", "/service/"+id+"/logs"+query, "").want(t, 200)
		var got []string
		for line := range strings.Lines(a.body) {
			if strings.HasPrefix(line, prefix) {
				got = append(got, strings.TrimSuffix(line, "\n"))
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("logs%s: %d lines with %q, want %d; last %q", query, len(got), prefix, len(want), got[max(0, len(got)-1):])
		}
	}
	wantLines("", "out", out)
	wantLines("", "err", errs)
	wantLines("?stderr=false", "", out)
	wantLines("?stdout=false", "", errs)
	wantLines("?tail=0", "", nil)
	if a := m.do(t, "GET", "/service/"+id+"/logs?tail=3", "").want(t, 200); strings.Count(a.body, "\n") != 3 {
		t.Errorf("logs?tail=3: %q", a.body)
	}
	wantLines("?tail=999999999", "out", out)
	wantLines("?until=1", "", nil)
	wantLines("?since=9999999999", "", nil)
	wantLines("?since=0&until=9999999999.999999999", "out", out)
	m.do(t, "GET", "/service/"+id+"/logs?stdout=false&stderr=false", "").want(t, 400)

	stamped := m.do(t, "GET", "/service/"+id+"/logs?timestamps=true&stderr=false", "").want(t, 200)
	lines := strings.Split(strings.TrimSpace(stamped.body), "\n")
	stamp, text, _ := strings.Cut(lines[250], " ")
	at, err := time.Parse(time.RFC3339Nano, stamp)
	if err != nil || text != "out 250" {
		t.Fatalf("line %q: %v", lines[250], err)
	}
	since := fmt.Sprintf("%d.%09d", at.Unix(), at.Nanosecond())
	after := m.do(t, "GET", "/service/"+id+"/logs?stderr=false&since="+since, "").want(t, 200).body
	if !strings.HasPrefix(after, "out 250\n") || !strings.HasSuffix(after, "out 499\n") {
		t.Errorf("logs since %s: %.40q", since, after)
	}
	before := m.do(t, "GET", "/service/"+id+"/logs?stderr=false&until="+since, "").want(t, 200).body
	if !strings.HasPrefix(before, "out 0\n") || !strings.HasSuffix(before, "out 250\n") {
		t.Errorf("logs until %s: ends with %q", since, consoleTail(before))
	}

	m.ctl(t, id, "kill")
	if err := l.end(t); err != nil {
		t.Error(err)
	}
	follow := m.do(t, "GET", "/service/"+id+"/logs?follow=true", "").want(t, 200)
	if !strings.Contains(follow.body, "the end of out") || !strings.Contains(follow.body, "the end of err") {
		t.Errorf("the last words are not in the logs: %q", consoleTail(follow.body))
	}
	if follow.body != m.do(t, "GET", "/service/"+id+"/logs", "").want(t, 200).body {
		t.Error("the logs of a stopped service differ if they are followed")
	}
}

func TestEveryByteReachesAProgram(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for _, tty := range []bool{true, false} {
		t.Run(fmt.Sprintf("tty %v", tty), func(t *testing.T) {
			t.Parallel()
			id, l := m.consoleRun(t, "record", fmt.Sprintf(`"tty":%v`, tty))
			l.wait(t, "ready")
			want := ""
			for i, chunk := range consoleBytes() {
				m.stdin(t, id, chunk).want(t, 204)
				want += chunk
				if i%50 == 0 {
					m.wantRecorded(t, id, want)
				}
			}
			m.wantRecorded(t, id, want)
			text := make([]byte, 10<<20)
			mathrand.NewChaCha8([32]byte{3}).Read(text)
			m.stdin(t, id, string(text)).want(t, 204)
			m.wantRecorded(t, id, want+string(text))
		})
	}
}

func TestWritersOfOneServiceNeverTearEachOthersChunks(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for _, tty := range []bool{true, false} {
		for _, writers := range []int{2, 10} {
			t.Run(fmt.Sprintf("tty %v, %d writers", tty, writers), func(t *testing.T) {
				t.Parallel()
				id, l := m.consoleRun(t, "record", fmt.Sprintf(`"tty":%v`, tty))
				l.wait(t, "ready")
				var all sync.WaitGroup
				for writer := range writers {
					all.Go(func() {
						for number := range 20 {
							m.stdin(t, id, consoleRecord(writer, number, 1500)).want(t, 204)
						}
					})
				}
				all.Wait()
				waitFor(t, "all records", func() bool { return len(m.recorded(t, id)) >= writers*20*1512 })
				if records := consoleRecords(t, m.recorded(t, id)); records != writers*20 {
					t.Errorf("%d records", records)
				}
			})
		}
	}
}

func TestFollowEndsOrderlyWithEveryRun(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for name, end := range map[string]func(id string){
		"stop":                             func(id string) { m.ctl(t, id, "stop") },
		"kill":                             func(id string) { m.ctl(t, id, "kill") },
		"restart":                          func(id string) { m.ctl(t, id, "restart") },
		"restart with another environment": func(id string) { m.setEnv(t, id, `{"A":"1"}`); m.ctl(t, id, "restart") },
		"exit": func(id string) {
			if a := m.stdin(t, id, "exit\n"); a.status != 409 { // it was too fast
				a.want(t, 204)
			}
		},
		"delete": func(id string) { m.do(t, "DELETE", "/service/"+id, "").want(t, 204) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mode := map[bool]string{true: "shell", false: "deaf"}[name == "exit"]
			id, l := m.consoleRun(t, mode, `"tty":false`)
			for n := range 8 {
				l.wait(t, "ready\n")
				var many []logStream
				for range 5 {
					many = append(many, logsOpen(t, m.daemon, "/service/"+id+"/logs?follow=true&tail=1"))
				}
				end(id)
				for _, l := range append(many, l) {
					if err := l.end(t); err != nil {
						t.Errorf("round %d: ended with %v", n, err)
					}
				}
				if name == "delete" {
					m.do(t, "GET", "/service/"+id+"/logs", "").want(t, 404)
					return
				}
				m.ctl(t, id, "start")
				l = logsOpen(t, m.daemon, "/service/"+id+"/logs?follow=true&tail=1")
			}
		})
	}
}

func TestFollowOfARunningServiceIsBrokenOffWhenTheDaemonEnds(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id, l := m.consoleRun(t, "record", `"tty":true`)
	l.wait(t, "ready")
	r := stdinOpen(t, m.daemon, id)
	io.WriteString(r, "x")
	m.wantRecorded(t, id, "x")
	if err := m.stop(); err != nil {
		t.Error(err)
	}
	if err := l.end(t); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("the follow ended with %v", err)
	}
	if a := r.answer(t); a.status != 503 && a.status != 0 {
		t.Errorf("stdin: %d %s", a.status, a.body)
	}
}

func TestServiceThatDoesNotReadItsStdin(t *testing.T) {
	t.Parallel()
	m := newMachine(t, func(c *config) { c.timeouts.clientWrite = 2 * time.Second })
	for _, tty := range []bool{true, false} {
		t.Run(fmt.Sprintf("tty %v", tty), func(t *testing.T) {
			t.Parallel()
			id, l := m.consoleRun(t, "deaf", fmt.Sprintf(`"tty":%v`, tty))
			l.wait(t, "ready")
			other, l2 := m.consoleRun(t, "record", `"tty":false`)
			l2.wait(t, "ready")
			sent := crowdSend(t, m.daemon, "POST", "/service/"+id+"/stdin", strings.Repeat("x", 1<<20))
			for range 5 {
				m.stdin(t, other, "x").want(t, 204)
			}
			(<-sent).want(t, 504)
			m.wantRecorded(t, other, "xxxxx")
			m.ctl(t, id, "kill")
			m.stdin(t, id, "x").want(t, 409)
		})
	}
}

// A service that ends has not read what was on its way.
func TestStdinOfAServiceThatEndsWithinAChunk(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for name, end := range map[string]func(id string){
		"kill":    func(id string) { m.ctl(t, id, "kill") },
		"stop":    func(id string) { m.ctl(t, id, "stop") },
		"restart": func(id string) { m.ctl(t, id, "restart") },
		"delete":  func(id string) { m.do(t, "DELETE", "/service/"+id, "").want(t, 204) },
	} {
		for _, tty := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, tty %v", name, tty), func(t *testing.T) {
				t.Parallel()
				id, l := m.consoleRun(t, "deaf", fmt.Sprintf(`"tty":%v`, tty))
				l.wait(t, "ready")
				// Chunk by chunk, until one is not taken: the last of its request.
				for n := 0; ; n++ {
					sent := crowdSend(t, m.daemon, "POST", "/service/"+id+"/stdin", strings.Repeat("x", 30_000))
					select {
					case a := <-sent:
						a.want(t, 204)
						continue
					case <-time.After(2 * time.Second):
					}
					end(id)
					if a := <-sent; a.status != 409 && !(a.status == 404 && name == "delete") {
						t.Errorf("after %d chunks, answered %d %s", n, a.status, a.body)
					}
					return
				}
			})
		}
	}
}

func TestConsoleOfServicesInEveryState(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := m.create(t, `"cmd":["/probe","shell","/data"]`)
	const size = `{"rows":24,"cols":80}`
	for _, query := range []string{"", "?follow=true", "?tail=5&follow=1"} {
		if a := m.do(t, "GET", "/service/"+id+"/logs"+query, "").want(t, 200); a.body != "" {
			t.Errorf("logs%s of a service that never ran: %q", query, a.body)
		}
	}
	m.stdin(t, id, "x").want(t, 409)
	m.do(t, "POST", "/service/"+id+"/tty", size).want(t, 409)
	m.ctl(t, id, "start")
	if err := m.engine.ContainerPause(context.Background(), id); err != nil {
		t.Fatal(err)
	}
	m.stdin(t, id, "x").want(t, 409)
	m.do(t, "GET", "/service/"+id+"/logs", "").want(t, 200)
	if err := m.engine.ContainerUnpause(context.Background(), id); err != nil {
		t.Fatal(err)
	}
	shut := m.create(t, `"cmd":["/probe","deaf","/data"],"open_stdin":false,"tty":false`)
	m.ctl(t, shut, "start")
	m.stdin(t, shut, "x").want(t, 409)
	m.do(t, "POST", "/service/"+shut+"/tty", size).want(t, 409)
}

// Few enough that the engine begins no other file: then its follow repeats lines.
func TestLogsAreTheEngines(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for _, tty := range []bool{true, false} {
		id, l := m.consoleRun(t, "flood", fmt.Sprintf(`"tty":%v`, tty))
		last := fmt.Sprintf("%099d", 39_999)
		waitFor(t, "the last line", func() bool { return strings.Contains(l.text.tail(), last) })
		var want bytes.Buffer
		end := map[bool]string{true: "\r\n", false: "\n"}[tty]
		w := bufio.NewWriter(&want)
		for i := range 40_000 {
			fmt.Fprintf(w, "%099d%s", i, end)
		}
		w.Flush()
		if l.text.String() != want.String() {
			t.Errorf("tty %v: followed %d bytes, want %d", tty, len(l.text.String()), want.Len())
		}
		if a := m.do(t, "GET", "/service/"+id+"/logs", "").want(t, http.StatusOK); a.body != want.String() {
			t.Errorf("tty %v: %d bytes, want %d", tty, len(a.body), want.Len())
		}
	}
}

// tail returns what was written last.
func (b *syncBuffer) tail() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	text := b.text.Bytes()
	return string(text[max(0, len(text)-300):])
}

// The console of the documents, on Node.js: at which nobody types for longer than the daemon waits for a header.
func TestConsoleOfTheDocumentsOnNode(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("node"); err != nil {
		t.Skip("there is no Node.js here")
	}
	m := newMachine(t, nil)
	id, _ := m.consoleRun(t, "shell", "")
	console := exec.CommandContext(t.Context(), "node", "docs/console.mjs", m.url, id)
	console.Env = append(os.Environ(), "COREKEY="+m.key)
	var out, complaints syncBuffer
	console.Stdout, console.Stderr = &out, &complaints
	keys, err := console.StdinPipe()
	if err = cmp.Or(err, console.Start()); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- console.Wait() }()
	select {
	case err := <-ended:
		t.Fatalf("it ended while nobody typed: %v\n%s%s", err, &out, &complaints)
	case <-time.After(15 * time.Second):
	}
	io.WriteString(keys, "say hello\n")
	waitFor(t, "the answer", func() bool { return strings.Contains(out.String(), "<hello>") })
	io.WriteString(keys, "exit\n")
	if err := <-ended; err != nil {
		t.Errorf("it ended with %v\n%s%s", err, &out, &complaints)
	}
	refused, err := exec.Command("node", "docs/console.mjs", m.url, "nobody").CombinedOutput()
	if err == nil || !strings.Contains(string(refused), "core authorization") {
		t.Errorf("without the key: %v, %s", err, refused)
	}
}

// What the daemon passes on is as docs/openapi.json says, whatever the service does.
func TestEnginesAnswersFitTheAPIDocument(t *testing.T) {
	t.Parallel()
	operations, _ := readAPI(t)
	m := newMachine(t, nil)
	id := newID()
	ask := func(route, body string) answer {
		t.Helper()
		op := operations[route]
		return m.do(t, op.method, strings.ReplaceAll(op.path, "{id}", id), body).want(t, op.success)
	}
	fits := func(when string) {
		t.Helper()
		for _, route := range []string{"GET /service", "GET /service/{id}", "GET /service/{id}/stats"} {
			a := ask(route, "")
			media := operations[route].Responses[200].Content[a.header.Get("Content-Type")]
			var value any
			if decode(t, a.body, &value); media.Examples == nil || !media.Schema.fits(value) {
				t.Errorf("%s, %s: not as documented: %s", route, when, a.body)
			}
		}
	}
	usual := operations["POST /service"].bodies()[1]
	ask("POST /service", strings.NewReplacer(`"demo"`, `"`+id+`"`, "example/hello:1", m.image, `"/hello"`, `"/probe","run","/data"`, "8080", "0").Replace(usual))
	fits("created")
	m.ctl(t, id, "start")
	m.report(t, id)
	fits("running")
	for _, route := range []string{"POST /service/{id}/stdin", "POST /service/{id}/tty", "PATCH /service/{id}/env"} {
		ask(route, operations[route].bodies()[0])
	}
	if got := ask("GET /service/{id}/logs", "").header.Get("Content-Type"); operations["GET /service/{id}/logs"].Responses[200].Content[got].Examples == nil {
		t.Errorf("logs are %q", got)
	}
	m.do(t, "GET", "/service/"+id+"/logs?stdout=false&stderr=false", "").want(t, 400) // by the engine itself
	m.ctl(t, id, "kill")
	fits("killed")

	id = newID()
	m.foreign(t, id, nil)
	a := m.createAs(t, id, "").want(t, 409)
	var got any
	decode(t, a.body, &got)
	want := operations["POST /service"].Responses[409].Content["application/json"].Examples["IDTaken"].Value
	if is := strings.ReplaceAll(fmt.Sprint(got), id, "demo"); anyID.ReplaceAllString(is, "ID") != anyID.ReplaceAllString(fmt.Sprint(want), "ID") {
		t.Errorf("got  %s\nwant %s", is, want)
	}
}

// restarted stops the daemon, has something done meanwhile, and starts one on the same bind root.
func (m *machine) restarted(t *testing.T, meanwhile func()) {
	t.Helper()
	if err := m.stop(); err != nil {
		t.Fatal(err)
	}
	meanwhile()
	m.daemon = startDaemon(t, "", func(c *config) { c.binds = m.binds })
}

// The engine forgets what it did not sync, and administrators prune: the records are enough to make all services again.
func TestServicesAreMadeAgainAfterTheirContainersAreGone(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	port, _ := freePorts(t)
	id := m.create(t, fmt.Sprintf(`"env":["A=1"],"hostname":"named","max_ram":67108864,"max_cpu":50000,"user":"1000:7","port_map":{"8080/tcp":{"HostIp":"127.0.0.1","HostPort":%q}}`, port))
	plain := m.create(t, "")
	before := m.get(t, id)
	wantSame := func(when string) {
		t.Helper()
		after := m.get(t, id)
		if got, want := withoutEnv(t, after), withoutEnv(t, before); after.ID == before.ID || got != want || !slices.Equal(after.Config.Env, before.Config.Env) {
			t.Errorf("%s: %s\n%s\nwant another container like\n%s\n%s", when, after.ID, got, before.ID, want)
		}
		if len(m.containers(t, m.binds)) != 2 {
			t.Errorf("%s: there are %d containers", when, len(m.containers(t, m.binds)))
		}
		before = after
	}

	m.restarted(t, func() {
		for _, c := range m.containers(t, m.binds) {
			if err := m.engine.ContainerRemove(t.Context(), c.ID, container.RemoveOptions{Force: true, RemoveVolumes: true}); err != nil {
				t.Fatal(err)
			}
		}
	})
	wantSame("after all containers were removed")
	if before.State.Running {
		t.Error("the service runs")
	}
	m.ctl(t, id, "start")
	r := m.report(t, id)
	if !slices.Contains(r.Env, "A=1") || r.limit("memory.limit_in_bytes", "memory.max") != "67108864" || r.UID != 1000 {
		t.Errorf("the service sees %+v", r)
	}
	if got := ask(t, "tcp", "127.0.0.1:"+port); got != "tcp hello\n" {
		t.Errorf("its port answers %q", got)
	}
	m.ctl(t, id, "stop")

	m.setEnv(t, plain, `{"A":"pending"}`)
	pruned, err := m.engine.ContainersPrune(t.Context(), filters.NewArgs(filters.Arg("label", labelBinds+"="+m.binds)))
	if err != nil || len(pruned.ContainersDeleted) != 2 {
		t.Fatalf("pruned %q, %v", pruned.ContainersDeleted, err)
	}
	m.do(t, "GET", "/service/"+id, "").want(t, http.StatusServiceUnavailable, "unavailable")
	m.ctl(t, plain, "start")
	if r := m.report(t, plain); !slices.Contains(r.Env, "A=pending") {
		t.Errorf("the service sees %q", r.Env)
	}
	m.ctl(t, id, "stop")
	wantSame("after a prune")
}

// A deleted customer's data must not appear in the next customer's service.
func TestMovedBindRootGivesNobodyAnothersData(t *testing.T) {
	t.Parallel()
	mount := func(t *testing.T, dir string) {
		t.Helper()
		if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
			t.Fatalf("this test mounts a small file system, which takes root and CAP_SYS_ADMIN: %v", err)
		}
		t.Cleanup(func() {
			if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	}
	for name, move := range map[string]func(t *testing.T, binds string){
		"to another file system, with a link left": func(t *testing.T, binds string) {
			disk := t.TempDir()
			mount(t, disk)
			command(t, "cp", "-a", binds, disk+"/binds")
			if err := cmp.Or(os.RemoveAll(binds), os.Symlink(disk+"/binds", binds)); err != nil {
				t.Fatal(err)
			}
		},
		"under a disk that is mounted over it": func(t *testing.T, binds string) {
			disk := t.TempDir()
			command(t, "cp", "-a", binds, disk+"/binds")
			mount(t, binds)
			command(t, "cp", "-a", disk+"/binds/.", binds)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, nil)
			id := m.create(t, "")
			writeFile(t, filepath.Join(m.binds, id, "secret"), "the first customer's")
			move(t, m.binds)
			for _, request := range []struct{ method, path, body string }{
				{"DELETE", "/service/" + id, ""}, {"POST", "/service", createBodyJSON(newID(), "")},
				{"PUT", "/service/" + id, createBodyJSON(id, fmt.Sprintf(`"image":%q`, m.image))}, {"PATCH", "/service/" + id + "/env", "{}"},
				{"POST", "/service/" + id + "/ctl", `{"op":"start"}`}, {"POST", "/service/" + id + "/ctl", `{"op":"stop"}`},
				{"POST", "/service/" + id + "/ctl", `{"op":"restart"}`}, {"POST", "/service/" + id + "/ctl", `{"op":"kill"}`}, {"GET", "/health", ""},
			} {
				m.do(t, request.method, request.path, request.body).want(t, http.StatusServiceUnavailable, "bind_root_moved")
			}
			m.restarted(t, func() {})
			m.ctl(t, id, "start")
			if files := m.report(t, id).Files; !strings.HasSuffix(files["secret"], "the first customer's") {
				t.Errorf("the service has lost its data: %q", files)
			}
			m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
			m.createAs(t, id, "").want(t, http.StatusCreated)
			m.ctl(t, id, "start")
			if files := m.report(t, id).Files; files["secret"] != "" {
				t.Errorf("the next service reads %q", files)
			}
			m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
		})
	}
}

// The engine takes such an id for the beginning of several containers' ids, and inspects none.
func TestServiceWhoseIDSeveralContainerIDsBeginWith(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	begin, id := map[string]bool{}, ""
	for id == "" {
		created, err := m.engine.ContainerCreate(t.Context(), &container.Config{Image: m.image, Cmd: []string{"/probe"}}, nil, nil, nil, newID())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := m.engine.ContainerRemove(context.Background(), created.ID, container.RemoveOptions{}); err != nil {
				t.Error(err)
			}
		})
		if two := created.ID[:2]; begin[two] {
			id = two
		} else {
			begin[two] = true
		}
	}
	if err := os.Mkdir(filepath.Join(m.binds, id), 0o700); err != nil {
		t.Fatal(err)
	}
	m.do(t, "GET", "/service/"+id, "").want(t, http.StatusNotFound)
	m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
	m.createAs(t, id, "").want(t, http.StatusCreated)
	m.ctl(t, id, "start")
	m.report(t, id)
	m.setEnv(t, id, `{"A":"1"}`)
	m.ctl(t, id, "restart")
	m.report(t, id)
	m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
	m.wantNothing(t)
}
