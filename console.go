package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
)

// logsParameter matches the query parameters of a logs request, which are the engine's. A time is in Unix
// seconds, or in the form of RFC 3339, which the engine prints.
var logsParameter = regexp.MustCompile(`^((follow|timestamps|stdout|stderr)=(true|false|1|0)|` +
	`tail=(all|[0-9]{1,9})|(since|until)=([0-9]{1,10}(\.[0-9]{1,9})?|` +
	`[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}(\.[0-9]{1,9})?(Z|[+-][0-9:]{5})))$`)

// stdinChunk is the most bytes that one attach carries. If the service does not read them, the engine keeps
// the connection until the service does, or for two minutes after it has stopped. With more than 32 KiB,
// engine 20.10 never closes it.
const stdinChunk = 32 << 10

// console gives access to a service's output, stdin and terminal.
type console struct {
	containers *containers
	engine     *engine
	stdinLocks *keyedMutex // by container id
	timeouts   timeouts
	shutdown   context.Context // ends when the daemon starts to shut down
}

// serviceLogs answers GET /service/{id}/logs with what the service has printed and, with follow, what it
// prints from now on. A followed stream ends with a final chunk only if the service stopped; anything else
// aborts the connection.
func (c *console) serviceLogs(w http.ResponseWriter, r *http.Request) error {
	options, err := logsOptions(r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	opening := time.AfterFunc(c.timeouts.engineRead, cancel)
	run, logs, err := c.openLogs(ctx, r.PathValue("id"), options)
	if !opening.Stop() {
		err = context.DeadlineExceeded
	}
	if err != nil {
		return err
	}
	defer logs.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Write(nil) // send the header now: the first output may be long in coming
	if run.Config.Tty {
		_, err = io.Copy(w, logs)
	} else {
		err = demultiplex(w, logs)
	}
	if err != nil || !options.Follow {
		return err
	}
	return c.checkStopped(ctx, r.PathValue("id"), run)
}

// checkStopped returns an error unless the run has ended: only then are its logs complete.
func (c *console) checkStopped(ctx context.Context, id string, run containerInfo) error {
	err := c.sameRun(ctx, id, run)
	if err == nil {
		return errors.New("the engine ended the logs of a running service")
	}
	if kind, _ := describe(err); kind == kindNotRunning || kind == kindNoSuchService { // stopped, or deleted
		return nil
	}
	return err
}

// openLogs returns the engine's logs of a service's container, and that container. The caller closes the
// logs.
func (c *console) openLogs(ctx context.Context, id string, options container.LogsOptions) (
	containerInfo, io.ReadCloser, error) {
	for try := 1; ; try++ {
		current, err := c.containers.lookup(ctx, id)
		if err != nil {
			return current, nil, err
		}
		logs, err := c.engine.api().ContainerLogs(ctx, current.ID, options)
		if !errdefs.IsNotFound(err) || try == 2 { // not found: it has just been replaced, look again
			return current, logs, err
		}
	}
}

// logsOptions reads the query of a logs request.
func logsOptions(r *http.Request) (container.LogsOptions, error) {
	query := r.URL.Query()
	on := func(name, otherwise string) bool {
		return slices.Contains([]string{"true", "1"}, cmp.Or(query.Get(name), otherwise))
	}
	for _, name := range []string{"since", "until"} {
		text := query.Get(name)
		if _, err := time.Parse(time.RFC3339, text); err != nil && strings.Contains(text, "T") {
			return container.LogsOptions{}, badRequest("%s=%s: not a date and time", name, text)
		}
	}
	follow := on("follow", "false")
	if follow && query.Has("until") { // the engine would end the answer at the first line after it
		return container.LogsOptions{}, badRequest("until: not allowed with follow")
	}
	return container.LogsOptions{
		Follow:     follow && r.Method == http.MethodGet, // a HEAD would hang
		Timestamps: on("timestamps", "false"),
		ShowStdout: on("stdout", "true"),
		ShowStderr: on("stderr", "true"),
		Tail:       query.Get("tail"),
		Since:      query.Get("since"), // the SDK converts it to Unix time, as the engine requires
		Until:      query.Get("until"),
	}, nil
}

// serviceStdin answers POST /service/{id}/stdin when all of the body has been written to the service's
// stdin. The body may be an open session that lasts for hours.
func (c *console) serviceStdin(w http.ResponseWriter, r *http.Request) error {
	ctl := http.NewResponseController(w)
	defer context.AfterFunc(c.shutdown, func() { ctl.SetReadDeadline(time.Now()) })()
	run, err := c.containers.lookup(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	if !run.Config.OpenStdin {
		return newAPIError(kindNoStdin, "the service was created without open_stdin")
	}
	if !run.State.Running {
		return newAPIError(kindNotRunning, "the service does not run")
	}
	err = c.copyStdin(r.Context(), r.PathValue("id"), run, r.Body)
	if err != nil && c.shutdown.Err() != nil {
		return newAPIError(kindUnavailable, "the daemon is shutting down")
	}
	return err
}

// copyStdin writes the whole body to the run's stdin, each part as soon as it has arrived.
func (c *console) copyStdin(ctx context.Context, id string, run containerInfo, body io.Reader) error {
	chunk := make([]byte, stdinChunk)
	for {
		n, readErr := body.Read(chunk)
		if n > 0 {
			if err := c.writeStdin(ctx, id, run, chunk[:n]); err != nil {
				return err
			}
		}
		if readErr == io.EOF {
			return nil
		}
		if readErr != nil {
			return badRequest("the body is incomplete")
		}
	}
}

// writeStdin writes one chunk through one attach and returns when the engine has passed all of it on. The
// engine interleaves concurrent attaches, so they take turns. run is the run that the chunk is meant for.
func (c *console) writeStdin(request context.Context, id string, run containerInfo, chunk []byte) error {
	ctx, cancel := context.WithTimeout(request, c.timeouts.clientWrite)
	defer cancel()
	unlock, err := c.stdinLocks.lock(ctx, run.ID)
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.sameRun(ctx, id, run); err != nil {
		return err
	}
	query := url.Values{"stream": {"1"}, "stdin": {"1"}, "detachKeys": {detachKeys(chunk)}}
	call := url.URL{Path: c.engine.versioned("/containers/" + run.ID + "/attach"), RawQuery: query.Encode()}
	upgrade := http.Header{"Connection": {"Upgrade"}, "Upgrade": {"tcp"}}
	resp, err := c.engine.send(ctx, http.MethodPost, call, upgrade, http.StatusSwitchingProtocols)
	if errdefs.IsNotFound(err) {
		return newAPIError(kindNotRunning, "the service has stopped")
	}
	if err != nil {
		return err
	}
	pipe := resp.Body.(interface { // half-closable
		io.ReadWriteCloser
		CloseWrite() error
	})
	defer pipe.Close()
	defer context.AfterFunc(ctx, func() { pipe.Close() })()
	_, err = pipe.Write(chunk)
	err = cmp.Or(err, pipe.CloseWrite())
	_, readErr := io.Copy(io.Discard, pipe)
	if ctx.Err() != nil {
		// An engine that begins to attach while the service stops keeps the connection open (seen with 28.5).
		return cmp.Or(c.sameRun(request, id, run), newAPIError(kindTimeout, "the service does not read its stdin"))
	}
	// The engine also closes the connection when the service stops.
	return cmp.Or(c.sameRun(ctx, id, run), err, readErr)
}

// sameRun returns nil if the service's container has not stopped since run was looked up.
func (c *console) sameRun(ctx context.Context, id string, run containerInfo) error {
	now, err := c.containers.lookup(ctx, id)
	if err != nil {
		return err
	}
	if !now.State.Running || now.ID != run.ID || now.State.StartedAt != run.State.StartedAt {
		return newAPIError(kindNotRunning, "the service has stopped; it may not have read everything")
	}
	return nil
}

// resizeTTY answers POST /service/{id}/tty.
func (c *console) resizeTTY(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Rows uint16 `json:"rows"`
		Cols uint16 `json:"cols"`
	}
	if err := readJSON(r, &body); err != nil {
		return err
	}
	if body.Rows == 0 || body.Cols == 0 {
		return badRequest("rows and cols: must be 1 to 65535")
	}
	current, err := c.containers.lookup(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	if !current.Config.Tty {
		return newAPIError(kindNoTTY, "the service was created without tty")
	}
	if !current.State.Running {
		return newAPIError(kindNotRunning, "the service does not run")
	}
	size := container.ResizeOptions{Height: uint(body.Rows), Width: uint(body.Cols)}
	err = c.engine.api().ContainerResize(r.Context(), current.ID, size)
	if errdefs.IsNotFound(err) || errdefs.IsConflict(err) { // it has just stopped, or was replaced
		return newAPIError(kindNotRunning, "the service has stopped")
	}
	return err
}

// demultiplex copies the payloads of the engine's frames, of both stdout and stderr, to w. A frame is a
// header of eight bytes, the last four of which are the payload's length, and the payload. It replaces the
// SDK's stdcopy.StdCopy, which takes a truncated frame for a whole one, and holds each frame in memory.
func demultiplex(w io.Writer, frames io.Reader) error {
	var header [8]byte
	for {
		if _, err := io.ReadFull(frames, header[:]); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if header[0] != 1 && header[0] != 2 { // 3 is an error from the engine
			return errors.New("the engine cannot read the logs")
		}
		length := int64(binary.BigEndian.Uint32(header[4:]))
		if _, err := io.CopyN(w, frames, length); err == io.EOF {
			return io.ErrUnexpectedEOF
		} else if err != nil {
			return err
		}
	}
}

// detachKeys returns a value for the attach parameter of that name: keys that are not in chunk. The engine
// looks for them in what is written to a tty (by default ctrl-p ctrl-q), and drops what follows them. These
// are random, so that no client can guess them. Their first byte is not among the last bytes of chunk: the
// engine would withhold an end of the chunk that could be the start of the keys.
func detachKeys(chunk []byte) string {
	secret := rand.Text()
	first, end := byte(0xff), chunk[max(0, len(chunk)-len(secret)):]
	for bytes.IndexByte(end, first) >= 0 {
		first--
	}
	return strings.Join(strings.Split(string([]byte{first})+secret, ""), ",")
}
