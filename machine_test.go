//go:build integration

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/mount"
	"github.com/docker/docker/client"
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
	must(t, err)
	if _, err := engine.Ping(t.Context()); err != nil {
		t.Fatalf("these tests need a Docker Engine: %v", err)
	}
	t.Cleanup(func() { engine.Close() })
	m := &machine{daemon: startDaemon(t, "", change), engine: engine}
	m.image = m.importImage(t, string(archiveOf(imageFile("probe", buildProbe(t)))))
	m.cleanUp(t, m.binds, m.image)
	t.Cleanup(func() { m.stop() }) // before that, or a round would make the containers again
	return m
}

// buildProbe returns the static binary of testdata/probe.
func buildProbe(t testing.TB) string {
	t.Helper()
	binary, err := builtProbe()
	must(t, err)
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

func (m *machine) importImage(t testing.TB, archive string) (id string) {
	t.Helper()
	var body struct {
		ImageID string `json:"image_id"`
	}
	decode(t, m.do(t, "POST", "/docker/image", archive).want(t, http.StatusCreated).body, &body)
	return body.ImageID
}

// importPast has the engine make an image past the daemon, whose images have no volumes.
func importPast(t testing.TB, engine *client.Client, ref string, changes []string, files ...entry) {
	t.Helper()
	source := image.ImportSource{Source: bytes.NewReader(archiveOf(files...)), SourceName: "-"}
	progress, err := engine.ImageImport(context.Background(), source, ref, image.ImportOptions{Changes: changes})
	must(t, err)
	defer progress.Close()
	_, err = lastStatus(progress)
	must(t, err)
}

// cleanUp removes, when the test ends, the containers of the daemon with these bind
// directories, with their volumes, and then an image.
func (m *machine) cleanUp(t testing.TB, binds, imageRef string) {
	t.Cleanup(func() {
		for _, c := range m.containers(t, binds) {
			options := container.RemoveOptions{Force: true, RemoveVolumes: true}
			if err := m.engine.ContainerRemove(context.Background(), c.ID, options); err != nil &&
				!errdefs.IsNotFound(err) {
				t.Error(err)
			}
		}
		if imageRef == "" {
			return
		}
		options := image.RemoveOptions{Force: true, PruneChildren: true}
		if _, err := m.engine.ImageRemove(context.Background(), imageRef, options); err != nil &&
			!errdefs.IsNotFound(err) {
			t.Error(err)
		}
	})
}

// containers returns what a daemon has on the engine, unfinished ones included.
func (m *machine) containers(t testing.TB, binds string) []container.Summary {
	t.Helper()
	list, err := m.engine.ContainerList(context.Background(), container.ListOptions{
		All: true, Filters: filters.NewArgs(filters.Arg("label", labelBinds+"="+binds))})
	must(t, err)
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

// foreign runs the probe in a container that no daemon made and returns its id.
func (m *machine) foreign(t testing.TB, name string, labels map[string]string, mounts ...string) string {
	t.Helper()
	host := &container.HostConfig{NetworkMode: "none"}
	for _, dir := range mounts {
		host.Mounts = append(host.Mounts, mount.Mount{Type: mount.TypeBind, Source: dir, Target: "/data"})
	}
	created, err := m.engine.ContainerCreate(t.Context(), &container.Config{Image: m.image, Labels: labels,
		Cmd: []string{"/probe", "run", "/tmp"}, WorkingDir: "/tmp"}, host, nil, nil, name)
	must(t, err)
	t.Cleanup(func() {
		err := m.engine.ContainerRemove(context.Background(), created.ID, container.RemoveOptions{Force: true})
		if err != nil && !errdefs.IsNotFound(err) {
			t.Error(err)
		}
	})
	must(t, m.engine.ContainerStart(t.Context(), created.ID, container.StartOptions{}))
	return created.ID
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
	must(t, err)
	must(t, os.Remove(path))
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

// onV2 returns text where the kernel has version 2 of cgroups.
func (r report) onV2(text string) string {
	if _, ok := r.Cgroup["cpu.max"]; ok {
		return text
	}
	return ""
}

func decode(t testing.TB, text string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		t.Fatalf("%v in %.200s", err, text)
	}
}

func toJSON(t testing.TB, v any) string {
	t.Helper()
	text, err := json.Marshal(v)
	must(t, err)
	return string(text)
}

// writeFile writes a file and makes the directories that it is in.
func writeFile(t testing.TB, path, content string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(content), 0o644))
}

func wantFile(t testing.TB, path, content string) {
	t.Helper()
	if text, err := os.ReadFile(path); err != nil || string(text) != content {
		t.Errorf("%s holds %q, %v, want %q", path, text, err, content)
	}
}

// freePorts returns a TCP and a UDP port of the host that nobody uses.
func freePorts(t testing.TB) (tcp, udp string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer listener.Close()
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	defer packets.Close()
	_, tcp, _ = net.SplitHostPort(listener.Addr().String())
	_, udp, _ = net.SplitHostPort(packets.LocalAddr().String())
	return tcp, udp
}

// ask sends a line and returns the answer.
func ask(t testing.TB, network, address string) string {
	t.Helper()
	conn, err := net.DialTimeout(network, address, 10*time.Second)
	must(t, err)
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

// imageFile is a program of a root file system.
func imageFile(name, content string) entry {
	return entry{name: name, mode: 0o755, uid: 7, gid: 8, body: content}
}
