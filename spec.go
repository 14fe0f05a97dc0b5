package main

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/json"
	"maps"
	"math"
	"net/netip"
	"net/url"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/mount"
	"github.com/docker/go-connections/nat"
)

// imagePath is one component of a repository's name.
const imagePath = `[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*`

var (
	imageName = regexp.MustCompile(
		`^([A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?/)?` + imagePath + `(/` + imagePath + `)*` +
			`(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$`)
	userName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)
	imageID  = regexp.MustCompile(`^(sha256:)?[0-9a-f]{64}$`)
	// partOfID matches what the engine would take for an abbreviated image id.
	partOfID = regexp.MustCompile(`^(sha256:)?[0-9a-f]{1,63}$`)
	// signalName matches the signals that the engine accepts: the names in signal(7), or a number.
	signalName = regexp.MustCompile(`^((SIG)?(ABRT|ALRM|BUS|CHLD|CLD|CONT|FPE|HUP|ILL|INT|IO|IOT|KILL|PIPE|` +
		`POLL|PROF|PWR|QUIT|SEGV|STKFLT|STOP|SYS|TERM|TRAP|TSTP|TTIN|TTOU|URG|USR1|USR2|VTALRM|WINCH|XCPU|XFSZ|` +
		`RTMIN(\+([1-9]|1[0-5]))?|RTMAX(-([1-9]|1[0-4]))?)|[1-9]|[1-5][0-9]|6[0-4])$`)
	hostLabel = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$`) // RFC 1123
)

const (
	cpuPeriod = 100_000     // microseconds
	minCPU    = 1_000       // microseconds; the kernel's minimum
	maxCPU    = 100_000_000 // 1,000 processors
	minRAM    = 6 << 20     // bytes; the engine's minimum
	maxRAM    = 1 << 50
)

// serviceParams are the parameters of a service. Its record has them as JSON, without BindContents.
type serviceParams struct {
	ID              string                    `json:"id"`
	Image           string                    `json:"image"`
	BindDir         string                    `json:"bind_dir"` // path in the container
	BindContents    string                    `json:"bind_contents,omitempty"`
	Cmd             []string                  `json:"cmd,omitempty"`
	Shell           []string                  `json:"shell,omitempty"`
	User            string                    `json:"user,omitempty"`
	WorkingDir      string                    `json:"working_dir,omitempty"`
	Env             []string                  `json:"env,omitempty"` // K=V, or K to unset the image's
	OpenStdin       *bool                     `json:"open_stdin,omitempty"`
	TTY             *bool                     `json:"tty,omitempty"`
	Hostname        string                    `json:"hostname,omitempty"`
	StopSignal      stopSignal                `json:"stop_signal,omitempty"`
	PortMap         map[string]hostMapEntries `json:"port_map,omitempty"` // by <port>/<protocol>
	NetworkDisabled bool                      `json:"network_disabled,omitempty"`
	MaxCPU          *int64                    `json:"max_cpu,omitempty"` // microseconds per cpuPeriod
	MaxRAM          *int64                    `json:"max_ram,omitempty"` // bytes
}

// stopSignal is the signal that stops a service. JSON may give it as a string or as a number.
type stopSignal string

func (s *stopSignal) UnmarshalJSON(text []byte) error {
	if text[0] == '"' {
		return json.Unmarshal(text, (*string)(s))
	}
	*s = stopSignal(text) // signalName rejects everything but a number
	return nil
}

// hostMapEntries are the host addresses and ports of one published port. JSON may give one or an array.
type hostMapEntries []hostMapEntry

type hostMapEntry struct {
	HostIP   string `json:"HostIp,omitempty"`
	HostPort string // "0": the engine chooses
}

func (h *hostMapEntries) UnmarshalJSON(text []byte) error {
	if !bytes.HasPrefix(text, []byte("[")) {
		text = slices.Concat([]byte("["), text, []byte("]"))
	}
	if err := decodeJSON(text, (*[]hostMapEntry)(h)); err != nil {
		return badRequest("port_map: %s", strings.TrimPrefix(err.Error(), "the body: "))
	}
	return nil
}

// serviceSpec is one set of parameters, with the image that was checked for them.
type serviceSpec struct {
	Params  serviceParams `json:"params"`
	ImageID string        `json:"image_id"` // of Params.Image when it was checked: sha256:…

	imageUser string // USER of its configuration; not in the record, as only a create needs it
}

// serviceRecord is the desired state of a service. If the engine differs, the record is right.
type serviceRecord struct {
	serviceSpec
	UID      string       `json:"uid"`               // of the service, from its create to its DELETE
	Revision string       `json:"revision"`          // of the spec; a label of the container made from it
	Pending  *serviceSpec `json:"pending,omitempty"` // for the next start; nil if nothing changes
}

// latest returns the spec that the next start will run.
func (r serviceRecord) latest() serviceSpec {
	if r.Pending != nil {
		return *r.Pending
	}
	return r.serviceSpec
}

// applied returns the record with what is pending applied, and with a new revision. The revision is random
// and not a hash of the parameters: a daemon that encodes JSON differently must not replace every container.
func (r serviceRecord) applied() serviceRecord {
	return serviceRecord{serviceSpec: r.latest(), UID: r.UID, Revision: rand.Text()}
}

// check returns a 400 that names the first invalid field.
func (p *serviceParams) check() error {
	target := bindTarget(p.BindDir)
	workingDir := path.Clean(p.WorkingDir)
	contents, contentsErr := url.Parse(p.BindContents)
	hasNUL := func(text string) bool { return strings.Contains(text, "\x00") }
	for _, rule := range []struct {
		broken bool
		text   string
	}{
		{!serviceID.MatchString(p.ID),
			"id: must be 2 to 63 letters, digits, _ or -, and begin with a letter or digit"},
		// A name such as ../containers/x would reach another path of the engine's API.
		{!imageName.MatchString(p.Image) || len(p.Image) > 512, "image: must be an image's name or id"},
		{partOfID.MatchString(p.Image),
			"image: could be the beginning of an id: must be an id in full, or a name with its tag"},
		{p.BindDir == "" || target == "/" || within(target, "/proc", "/sys", "/dev") || hasControl(target),
			"bind_dir: must be a path in the container, not / and not under /proc, /sys or /dev"},
		{p.BindContents != "" && (contentsErr != nil || contents.Host == "" ||
			contents.Scheme != "http" && contents.Scheme != "https"),
			"bind_contents: must be an http or https URL"},
		{slices.ContainsFunc(p.Cmd, hasNUL), "cmd: must not contain NUL"},
		{slices.ContainsFunc(p.Shell, hasNUL), "shell: must not contain NUL"},
		{slices.ContainsFunc(p.Env, hasNUL), "env: must not contain NUL"},
		{slices.ContainsFunc(p.Env, func(e string) bool { return e == "" || e[0] == '=' }),
			"env: each must be NAME=VALUE or NAME"},
		// A number that does not fit an int32 becomes root in some runtimes: CVE-2024-40635.
		{p.User != "" && !validUser(p.User),
			"user: must be a user or user:group, by name or by number up to 2147483647"},
		// One under /proc/self/fd can be a directory of the host that runc left open: CVE-2024-21626.
		{p.WorkingDir != "" && (!path.IsAbs(workingDir) || within(workingDir, "/proc") || hasControl(workingDir)),
			"working_dir: must be an absolute path, not under /proc"},
		{p.Hostname != "" && !hostLabel.MatchString(p.Hostname),
			"hostname: must be 1 to 63 letters, digits or -, and begin and end with a letter or digit"},
		{p.StopSignal != "" && !signalName.MatchString(string(p.StopSignal)),
			"stop_signal: must be a signal's name, with or without SIG, or a number from 1 to 64"},
		{p.MaxCPU != nil && (*p.MaxCPU < minCPU || *p.MaxCPU > maxCPU),
			"max_cpu: must be 1000 to 100000000 microseconds per 100000"},
		{p.NetworkDisabled && len(p.PortMap) > 0, "port_map: must be empty with network_disabled"},
		{p.MaxRAM != nil && (*p.MaxRAM < minRAM || *p.MaxRAM > maxRAM),
			"max_ram: must be 6291456 to 1125899906842624 bytes"},
	} {
		if rule.broken {
			return badRequest("%s", rule.text)
		}
	}
	return p.checkPorts()
}

// bindTarget returns where in the container the bind directory is mounted.
func bindTarget(dir string) string { return path.Clean("/" + dir) }

// within reports whether a clean path is one of dirs or below one.
func within(p string, dirs ...string) bool {
	return slices.ContainsFunc(dirs, func(dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") })
}

func hasControl(text string) bool { return strings.ContainsFunc(text, unicode.IsControl) }

// validUser reports whether user is a name or a number, alone or with a group. A number must fit an int32.
func validUser(user string) bool {
	parts := strings.Split(user, ":")
	return len(parts) <= 2 && !slices.ContainsFunc(parts, func(part string) bool {
		_, err := strconv.ParseInt(part, 10, 32)
		return !userName.MatchString(part) || err != nil && strings.Trim(part, "0123456789") == ""
	})
}

// checkPorts checks the ports in the order of their keys, so that the same body always gets the same error.
func (p *serviceParams) checkPorts() error {
	for _, key := range slices.Sorted(maps.Keys(p.PortMap)) {
		port, protocol, _ := strings.Cut(key, "/")
		if !validPort(port, 1) || !slices.Contains([]string{"tcp", "udp", "sctp"}, protocol) {
			return badRequest("port_map: %q: must be a port from 1 to 65535, a slash, and tcp, udp or sctp", key)
		}
		if len(p.PortMap[key]) == 0 {
			return badRequest("port_map: %q: must have a HostPort", key)
		}
		for _, host := range p.PortMap[key] {
			ip, err := netip.ParseAddr(host.HostIP)
			if !validPort(host.HostPort, 0) || host.HostIP != "" && (err != nil || ip.Zone() != "") {
				return badRequest(
					"port_map: %q: HostPort must be a number from 0 to 65535 as a string, HostIp an IP address", key)
			}
		}
	}
	return nil
}

// validPort accepts only one spelling of each number: "080" would be a second key for port 80.
func validPort(text string, least int) bool {
	n, err := strconv.Atoi(text)
	return err == nil && n >= least && n <= math.MaxUint16 && strconv.Itoa(n) == text
}

// containerSettings are the flags that hold for the containers of all services.
type containerSettings struct {
	binds       string        // path of the directory that holds the bind directories
	network     string        // engine network; empty for the engine's default bridge
	pidsLimit   int64         // processes and threads in one service
	stopTimeout time.Duration // between the stop signal and SIGKILL
}

// containerSpec returns everything that a service's container may do. The bind directory is a [mount.Mount]:
// in a Binds string, a bind_dir of x:/etc:ro would be parsed. Everything else is the engine's default: its
// seccomp profile, its masked paths, no devices.
func containerSpec(common containerSettings, r serviceRecord) (*container.Config, *container.HostConfig) {
	p, stopTimeout := r.Params, int(common.stopTimeout/time.Second)
	config := &container.Config{
		Labels:          map[string]string{labelService: p.ID, labelBinds: common.binds, labelRevision: r.Revision},
		Image:           r.ImageID, // the name may mean another image by now
		Cmd:             p.Cmd,
		Shell:           p.Shell,
		User:            p.User,
		WorkingDir:      p.WorkingDir,
		Env:             p.Env,
		OpenStdin:       p.OpenStdin == nil || *p.OpenStdin,
		Tty:             p.TTY == nil || *p.TTY,
		Hostname:        p.Hostname,
		ExposedPorts:    nat.PortSet{},
		NetworkDisabled: p.NetworkDisabled,
		StopSignal:      string(p.StopSignal),
		StopTimeout:     &stopTimeout,
		Healthcheck:     &container.HealthConfig{Test: []string{"NONE"}}, // the image's own would run unasked
	}
	host := &container.HostConfig{
		Mounts: []mount.Mount{{Type: mount.TypeBind,
			Source: filepath.Join(common.binds, p.ID), Target: bindTarget(p.BindDir)}},
		SecurityOpt:   []string{"no-new-privileges"},
		CapDrop:       []string{"AUDIT_WRITE", "MKNOD", "NET_RAW", "SETFCAP", "SETPCAP"},
		CgroupnsMode:  container.CgroupnsModePrivate,
		IpcMode:       container.IPCModePrivate,
		NetworkMode:   container.NetworkMode(common.network),
		PortBindings:  nat.PortMap{},
		RestartPolicy: container.RestartPolicy{Name: container.RestartPolicyDisabled},
		LogConfig: container.LogConfig{Type: "json-file",
			Config: map[string]string{"max-size": "10m", "max-file": "3"}},
		Resources: container.Resources{PidsLimit: &common.pidsLimit},
	}
	if p.NetworkDisabled {
		host.NetworkMode = "none"
	}
	for port, ends := range p.PortMap {
		config.ExposedPorts[nat.Port(port)] = struct{}{} // or the engine publishes nothing
		for _, end := range ends {
			host.PortBindings[nat.Port(port)] = append(host.PortBindings[nat.Port(port)], nat.PortBinding(end))
		}
	}
	if p.MaxCPU != nil {
		host.CPUPeriod, host.CPUQuota = cpuPeriod, *p.MaxCPU
	}
	if p.MaxRAM != nil {
		host.Memory, host.MemorySwap = *p.MaxRAM, *p.MaxRAM // MemorySwap is the sum of RAM and swap: no swap
	}
	return config, host
}

// bindOwner returns the owner of the bind directory and of everything that bind_contents puts there: the
// service's user, or else the image's, if it is numeric. For a name, which means nothing on the host, it
// returns nil, and the archive decides.
func (s serviceSpec) bindOwner() *owner {
	user, group, _ := strings.Cut(cmp.Or(s.Params.User, s.imageUser), ":")
	uid, err := strconv.ParseInt(user, 10, 32)
	if err != nil || uid < 0 {
		return nil
	}
	gid, err := strconv.ParseInt(group, 10, 32)
	if err != nil || gid < 0 { // a name, or none
		gid = 0
	}
	return &owner{int(uid), int(gid)}
}
