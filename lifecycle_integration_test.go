//go:build integration

package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/image"
)

// imageWithVolume makes an image of the probe that declares a volume and a variable.
func (m *machine) imageWithVolume(t testing.TB) string {
	t.Helper()
	ref := "duxcore-test/" + newID() + ":1"
	archive := archiveOf(imageFile("probe", buildProbe(t)))
	progress, err := m.engine.ImageImport(t.Context(),
		image.ImportSource{Source: bytes.NewReader(archive), SourceName: "-"}, ref,
		image.ImportOptions{Changes: []string{"VOLUME /vol", "ENV FROM_IMAGE=underneath"}})
	must(t, err)
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
		"user":"0:7","working_dir":"/vol","hostname":"kept","tty":false,
		"port_map":{"8080/tcp":{"HostPort":"0"}},"max_cpu":50000,"max_ram":67108864`, m.imageWithVolume(t)))
	starts := ""
	wantEnv := func(when string, env []string, want string) {
		t.Helper()
		got := slices.DeleteFunc(slices.Clone(env), func(v string) bool {
			return !strings.HasPrefix(v, "ENV") && v != "FROM_IMAGE=underneath"
		})
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

	volume := first.Mounts[slices.IndexFunc(first.Mounts, func(p container.MountPoint) bool {
		return p.Destination == "/vol"
	})].Name
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

func TestDeleteRemovesWhatIsLeft(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for name, lose := range map[string]func(t testing.TB, id string){
		"nothing is lost": func(t testing.TB, id string) {},
		"the directory is lost": func(t testing.TB, id string) {
			must(t, os.RemoveAll(filepath.Join(m.binds, id)))
		},
		"the container is lost": func(t testing.TB, id string) {
			must(t, m.engine.ContainerRemove(t.Context(), id, container.RemoveOptions{Force: true}))
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
	url := serveArchives(t, map[string][]byte{"/a": tgz(file("a", "x"), file("../b", "y"))})
	m := newMachine(t, func(c *config) { c.fetchAllow = loopback })
	for name, test := range map[string]struct {
		extra  string
		status int
	}{
		"an image without a command": {`"cmd":[]`, http.StatusBadRequest},
		"hostile contents":           {fmt.Sprintf(`"bind_contents":"%s/a"`, url), http.StatusBadRequest},
		"no such image":              {`"image":"sha256:` + strings.Repeat("0", 64) + `"`, http.StatusNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			m.createAs(t, newID(), test.extra).want(t, test.status)
			m.wantNothing(t)
		})
	}
}

// The engine forgets what it did not sync, and administrators prune: the records are enough to make all
// services again.
func TestServicesAreMadeAgainAfterTheirContainersAreGone(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	port, _ := freePorts(t)
	id := m.create(t, fmt.Sprintf(`"env":["A=1"],"hostname":"named","max_ram":67108864,"max_cpu":50000,`+
		`"user":"1000:7","port_map":{"8080/tcp":{"HostIp":"127.0.0.1","HostPort":%q}}`, port))
	plain := m.create(t, "")
	before := m.get(t, id)
	wantSame := func(when string) {
		t.Helper()
		after := m.get(t, id)
		if got, want := withoutEnv(t, after), withoutEnv(t, before); after.ID == before.ID || got != want ||
			!slices.Equal(after.Config.Env, before.Config.Env) {
			t.Errorf("%s: %s\n%s\nwant another container like\n%s\n%s", when, after.ID, got, before.ID, want)
		}
		if len(m.containers(t, m.binds)) != 2 {
			t.Errorf("%s: there are %d containers", when, len(m.containers(t, m.binds)))
		}
		before = after
	}

	m.restarted(t, func() {
		for _, c := range m.containers(t, m.binds) {
			must(t, m.engine.ContainerRemove(t.Context(), c.ID,
				container.RemoveOptions{Force: true, RemoveVolumes: true}))
		}
	})
	wantSame("after all containers were removed")
	if before.State.Running {
		t.Error("the service runs")
	}
	m.ctl(t, id, "start")
	r := m.report(t, id)
	if !slices.Contains(r.Env, "A=1") || r.limit("memory.limit_in_bytes", "memory.max") != "67108864" ||
		r.UID != 1000 {
		t.Errorf("the service sees %+v", r)
	}
	if got := ask(t, "tcp", "127.0.0.1:"+port); got != "tcp hello\n" {
		t.Errorf("its port answers %q", got)
	}
	m.ctl(t, id, "stop")

	m.setEnv(t, plain, `{"A":"pending"}`)
	pruned, err := m.engine.ContainersPrune(t.Context(),
		filters.NewArgs(filters.Arg("label", labelBinds+"="+m.binds)))
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
