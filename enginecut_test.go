//go:build integration

package main

import (
	"archive/tar"
	"cmp"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/client"
)

// The engine of this test is a real one, but not the machine's: the power of its disk is cut. The engine
// itself syncs that it has the image, but not the image's files: without the daemon's sync they are empty.
func TestImportSurvivesAPowerCut(t *testing.T) {
	t.Parallel()
	skipWithoutOwnEngine(t)
	d := newDisk(t, "with a journal")
	before := d.startEngine(t)
	var entries []entry
	for i := range 5 {
		content := make([]byte, 3<<20)
		rand.Read(content)
		entries = append(entries, imageFile(fmt.Sprint("file", i), string(content)))
	}
	id := before.importImage(t, string(archiveOf(entries...)))
	copied := d.afterCut(t)
	copied.dir = t.TempDir()
	copied.mount(t)
	after := copied.startEngine(t)
	after.do(t, "GET", "/docker/image", "").want(t, http.StatusOK, `"`+id+`"`)
	got := after.filesOfImage(t, id)
	for _, e := range entries {
		if want := describePath(0o755, owner{7, 8}, e.body); got[e.name] != want {
			t.Errorf("after a power cut %s is %q, want %q", e.name, got[e.name], want)
		}
	}
}

func skipWithoutOwnEngine(t *testing.T) {
	t.Helper()
	_, noDockerd := exec.LookPath("dockerd")
	_, noMkfs := exec.LookPath("mkfs.ext4")
	_, noLoop := os.Stat("/dev/loop-control")
	if err := cmp.Or(noDockerd, noMkfs, noLoop); err != nil || os.Geteuid() != 0 {
		t.Skipf("starts an engine on a disk of its own, which takes root, dockerd, mkfs.ext4\n"+
			"and loop devices: user %d, %v", os.Geteuid(), err)
	}
}

// startEngine starts an engine with all its data on the disk, and a daemon on it, until the test ends. It
// shares with the machine's engine
//   - no network: with "--bridge none" an engine removes the docker0 that it finds;
//   - no /run: it would use a containerd that it finds there, which keeps images on another disk;
//   - no daemon.json: an engine refuses to start with an option that is both in there and given here;
//   - no process ids: it is the first process of a namespace, with which the kernel kills the others there.
func (d *disk) startEngine(t *testing.T) *machine {
	t.Helper()
	dir := t.TempDir()
	host, options := "unix://"+filepath.Join(dir, "docker.sock"), filepath.Join(dir, "daemon.json")
	writeFile(t, options, "{}")
	process := exec.Command("sh", "-c",
		`mount -t proc proc /proc && mount -t tmpfs tmpfs /run && exec dockerd "$@"`, "sh",
		"--config-file", options, "--host", host, "--data-root", d.dir, "--exec-root", "/run/docker",
		"--pidfile", "/run/docker.pid", "--bridge", "none", "--iptables=false", "--ip6tables=false")
	process.Env = []string{"PATH=" + os.Getenv("PATH")} // no DOCKER_ variables
	var log strings.Builder
	process.Stdout, process.Stderr = &log, &log
	process.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   syscall.CLONE_NEWNET | syscall.CLONE_NEWPID,
		Unshareflags: syscall.CLONE_NEWNS, // with private mounts, see package syscall
		Pdeathsig:    syscall.SIGKILL,     // if this process dies
	}
	// Pdeathsig is sent when this thread ends, which another goroutine that locks it could cause.
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	must(t, process.Start())
	t.Cleanup(func() {
		process.Process.Kill()
		process.Wait() // until all in the namespace are gone; returns that it was killed
		if t.Failed() {
			t.Logf("the engine on %s:\n%s", d.dir, log.String())
		}
	})
	engine, err := client.NewClientWithOpts(client.WithHost(host), client.WithAPIVersionNegotiation())
	must(t, err)
	t.Cleanup(func() { engine.Close() })
	waitFor(t, "the engine answers", func() bool {
		_, err := engine.Ping(t.Context())
		return err == nil
	})
	return &machine{daemon: startDaemon(t, host, nil), engine: engine}
}

// filesOfImage describes the regular files that a container of the image would see.
func (m *machine) filesOfImage(t *testing.T, id string) tree {
	t.Helper()
	config := &container.Config{Image: id, Cmd: []string{"never started"}}
	created, err := m.engine.ContainerCreate(t.Context(), config, nil, nil, nil, "")
	must(t, err)
	exported, err := m.engine.ContainerExport(t.Context(), created.ID)
	must(t, err)
	defer exported.Close()
	files := tree{}
	for archive := tar.NewReader(exported); ; {
		header, err := archive.Next()
		if err == io.EOF {
			return files
		}
		content, readErr := io.ReadAll(archive)
		if err != nil || readErr != nil {
			t.Fatal(err, readErr)
		}
		if info := header.FileInfo(); info.Mode().IsRegular() {
			files[header.Name] = describePath(info.Mode(), owner{header.Uid, header.Gid}, string(content))
		}
	}
}
