package main

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
)

// logsParameter is all that a query for logs may say, in the engine's own terms. Times are
// Unix times in seconds.
var logsParameter = regexp.MustCompile(`^((follow|timestamps|stdout|stderr)=(true|false|1|0)|` +
	`tail=(all|[0-9]{1,9})|(since|until)=[0-9]{1,10}(\.[0-9]{1,9})?)$`)

// stdinChunk is how many bytes go to a service's stdin through one connection. Of one that the service
// does not read, the engine keeps a socket and a goroutine until it does, or is stopped; of more than
// 32 KiB engine 20.10 keeps them for ever.
const stdinChunk = 32 << 10

// serviceLogs answers GET /service/{id}/logs with what the service has printed and, if
// it is to follow, prints from now on. That ends in an orderly way only when the
// service's run does; whatever else ends it breaks the connection off.
func (s *server) serviceLogs(w http.ResponseWriter, r *http.Request) error {
	options := logsOptions(r)
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	opening := time.AfterFunc(s.waits.read, cancel)
	current, logs, err := s.openLogs(ctx, r.PathValue("id"), options)
	if !opening.Stop() {
		err = context.DeadlineExceeded
	}
	if err != nil {
		return err
	}
	defer logs.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Write(nil) // the header: the service may be silent for long
	if current.Config.Tty {
		_, err = io.Copy(w, logs)
	} else {
		err = demultiplex(w, logs)
	}
	if err != nil || !options.Follow {
		return err
	}
	err = s.sameRun(ctx, r.PathValue("id"), current)
	if err == nil {
		return errors.New("the engine ended the logs of a service that runs")
	}
	if kind, _ := describe(err); kind.status == http.StatusConflict || kind.status == http.StatusNotFound {
		return nil // stopped, or deleted
	}
	return err
}

// openLogs returns the engine's answer, and the container that it is about.
func (s *server) openLogs(ctx context.Context, id string, options container.LogsOptions) (
	inspected, io.ReadCloser, error) {
	for try := 1; ; try++ {
		current, err := s.containers.lookup(ctx, id)
		if err != nil {
			return current, nil, err
		}
		logs, err := s.engine.api().ContainerLogs(ctx, current.ID, options)
		if !errdefs.IsNotFound(err) || try == 2 { // else another container has just taken its place
			return current, logs, err
		}
	}
}

// logsOptions reads the parameters of the logs. A switch is on with true or 1, and off with all else.
func logsOptions(r *http.Request) container.LogsOptions {
	query := r.URL.Query()
	on := func(name, otherwise string) bool {
		return slices.Contains([]string{"true", "1"}, cmp.Or(query.Get(name), otherwise))
	}
	return container.LogsOptions{
		Follow:     on("follow", "false") && r.Method == http.MethodGet, // HEAD would not end
		Timestamps: on("timestamps", "false"),
		ShowStdout: on("stdout", "true"),
		ShowStderr: on("stderr", "true"),
		Tail:       query.Get("tail"),
		Since:      query.Get("since"),
		Until:      query.Get("until"),
	}
}

// serviceStdin answers POST /service/{id}/stdin when the service's stdin has taken all of
// the body. That may come in small parts, hours apart.
func (s *server) serviceStdin(w http.ResponseWriter, r *http.Request) error {
	defer context.AfterFunc(s.serving, func() { http.NewResponseController(w).SetReadDeadline(time.Now()) })()
	begin, err := s.containers.lookup(r.Context(), r.PathValue("id"))
	switch {
	case err == nil && !begin.Config.OpenStdin:
		err = failure(withoutStdin, "the service was created without open_stdin")
	case err == nil && !begin.State.Running:
		err = failure(notRunning, "the service does not run")
	}
	chunk := make([]byte, stdinChunk)
	var end error
	for err == nil && end == nil {
		var n int
		if n, end = r.Body.Read(chunk); n > 0 {
			err = s.writeStdin(r.Context(), r.PathValue("id"), begin, chunk[:n])
		}
	}
	switch {
	case err == nil && end == io.EOF:
		return nil
	case s.serving.Err() != nil:
		return failure(unavailable, "the daemon ends")
	}
	return cmp.Or(err, badRequest("the body is incomplete"))
}

// writeStdin returns when the service's stdin has taken the chunk. The engine reads a
// connection in pieces and mixes those of several, so that each chunk has one of its own,
// in turn; the engine ends it when all is written. begin is the run the chunk is meant for.
func (s *server) writeStdin(ctx context.Context, id string, begin inspected, chunk []byte) error {
	ctx, cancel := context.WithTimeout(ctx, s.waits.write)
	defer cancel()
	unlock, err := s.stdin.lock(ctx, begin.ID)
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.sameRun(ctx, id, begin); err != nil {
		return err
	}
	query := url.Values{"stream": {"1"}, "stdin": {"1"}, "detachKeys": {detachKeys(chunk)}}
	call := url.URL{Path: "/containers/" + begin.ID + "/attach", RawQuery: query.Encode()}
	upgrade := http.Header{"Connection": {"Upgrade"}, "Upgrade": {"tcp"}}
	answer, err := s.engine.send(ctx, http.MethodPost, call, upgrade, http.StatusSwitchingProtocols)
	if errdefs.IsNotFound(err) {
		return failure(notRunning, "the service has stopped")
	}
	if err != nil {
		return err
	}
	pipe := answer.Body.(interface { // whose two directions end apart
		io.ReadWriteCloser
		CloseWrite() error
	})
	defer pipe.Close()
	defer context.AfterFunc(ctx, func() { pipe.Close() })()
	_, err = pipe.Write(chunk)
	err = cmp.Or(err, pipe.CloseWrite())
	_, endErr := io.Copy(io.Discard, pipe)
	if ctx.Err() != nil {
		return failure(timedOut, "the service does not read its stdin")
	}
	return cmp.Or(s.sameRun(ctx, id, begin), err, endErr) // it ends as well when the service stops
}

// sameRun returns nil if the service has run without a break since it was seen as begin.
func (s *server) sameRun(ctx context.Context, id string, begin inspected) error {
	now, err := s.containers.lookup(ctx, id)
	if err == nil && (!now.State.Running || now.ID != begin.ID || now.State.StartedAt != begin.State.StartedAt) {
		err = failure(notRunning, "the service has stopped; it may not have read all")
	}
	return err
}

// resizeTTY answers POST /service/{id}/tty.
func (s *server) resizeTTY(w http.ResponseWriter, r *http.Request) error {
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
	current, err := s.containers.lookup(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	if !current.Config.Tty {
		return failure(withoutTTY, "the service was created without tty")
	}
	size := container.ResizeOptions{Height: uint(body.Rows), Width: uint(body.Cols)}
	if current.State.Running {
		err = s.engine.api().ContainerResize(r.Context(), current.ID, size)
		if !errdefs.IsNotFound(err) && !errdefs.IsConflict(err) { // else it has just stopped, or was replaced
			return err
		}
	}
	return failure(notRunning, "the service does not run")
}
