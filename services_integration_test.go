//go:build integration

package main

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/go-connections/nat"
)

func TestServiceRunsAsAsked(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := m.create(t, `"cmd":["/probe","run","/srv/a b","$HOME","two words",""],"shell":["/bin/x","-c"],
		"bind_dir":"srv/a b/", "user":"1234:2345", "working_dir":"/opt/here", "hostname":"Named-1",
		"env":["A=1","B=x=y z"],
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
	for file, want := range map[string]string{"memory.memsw.limit_in_bytes": "67108864",
		"memory.swap.max": "0"} {
		// Neither is there where the kernel does not account swap.
		if got, ok := r.Cgroup[file]; ok && strings.TrimSpace(got) != want {
			t.Errorf("%s is %q, want %s", file, got, want)
		}
	}
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

func TestPublishedPortsAnswerFromTheHost(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for name, test := range map[string]struct {
		ports  string // of TCP port 8080 and UDP port 8081
		chosen bool   // by the engine
	}{
		"object, chosen port": {`"8080/tcp":{"HostIp":"127.0.0.1","HostPort":"0"},` +
			`"8081/udp":{"HostIp":"127.0.0.1","HostPort":"0"}`, true},
		"array, chosen port": {`"8080/tcp":[{"HostIp":"127.0.0.1","HostPort":"0"}],"8081/udp":[{"HostPort":"0"}]`,
			true},
		"array of two": {`"8080/tcp":[{"HostIp":"127.0.0.1","HostPort":"TCP"},{"HostIp":"127.0.0.1",` +
			`"HostPort":"0"}],"8081/udp":{"HostIp":"127.0.0.1","HostPort":"UDP"}`, false},
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
			if slices.Contains(published["8080/tcp"], nat.PortBinding{HostIP: "127.0.0.1",
				HostPort: tcp}) == test.chosen {
				t.Errorf("published at %v, want 127.0.0.1 and the port asked for, %s", published, tcp)
			}
		})
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
			if isStats := strings.Contains(route, "stats"); isStats && strings.Contains(a.body, zeroTime) ==
				(when == "running") {
				t.Errorf("%s: statistics without both samples are for what does not run: %s", when, a.body)
			}
		}
	}
	usual := operations["POST /service"].bodies()[1]
	ask("POST /service", strings.NewReplacer(`"demo"`, `"`+id+`"`, "example/hello:1", m.image, `"/hello"`,
		`"/probe","run","/data"`, "8080", "0").Replace(usual))
	fits("created")
	m.ctl(t, id, "start")
	m.report(t, id)
	fits("running")
	for _, route := range []string{"POST /service/{id}/stdin", "POST /service/{id}/tty",
		"PATCH /service/{id}/env"} {
		ask(route, operations[route].bodies()[0])
	}
	logs := ask("GET /service/{id}/logs", "").header.Get("Content-Type")
	if operations["GET /service/{id}/logs"].Responses[200].Content[logs].Examples == nil {
		t.Errorf("logs are %q", logs)
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
	if is := strings.ReplaceAll(fmt.Sprint(got), id, "demo"); anyID.ReplaceAllString(is,
		"ID") != anyID.ReplaceAllString(fmt.Sprint(want), "ID") {
		t.Errorf("got  %s\nwant %s", is, want)
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
				attached, err := m.engine.ContainerAttach(t.Context(), id,
					container.AttachOptions{Stream: true, Stdin: true})
				must(t, err)
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

func TestMemoryHogIsKilled(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := m.create(t, `"cmd":["/probe","hog","/data"],"max_ram":33554432`)
	m.ctl(t, id, "start")
	m.waitForEnd(t, id)
	// The engine hears of the kill and of the exit in any order.
	waitFor(t, "the engine knows of the kill", func() bool { return m.get(t, id).State.OOMKilled })
	if state := m.get(t, id).State; state.ExitCode != 137 {
		t.Errorf("exit code %d, want 137", state.ExitCode)
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
