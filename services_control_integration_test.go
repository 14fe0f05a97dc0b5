//go:build integration

package main

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
)

func TestEnvChangesAtTheNextStart(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	ref := "duxcore-test/" + newID() + ":1"
	importPast(t, m.engine, ref, []string{"VOLUME /vol", "ENV FROM_IMAGE=underneath"},
		imageFile("probe", buildProbe(t)))
	m.cleanUp(t, m.binds, ref)
	id := m.create(t, fmt.Sprintf(`"image":%q,"env":["ENV=first"],
		"user":"0:7","working_dir":"/vol","hostname":"kept","tty":false,
		"port_map":{"8080/tcp":{"HostPort":"0"}},"max_cpu":50000,"max_ram":67108864`, ref))
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
