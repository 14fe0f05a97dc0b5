package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/pkg/stdcopy"
)

const stdinChunk = 64 << 10 // bytes written to a service's stdin at a time

// logsParameter is all that a query for logs may say, in the engine's own terms. Times are
// Unix times in seconds.
var logsParameter = regexp.MustCompile(`^((follow|timestamps|stdout|stderr)=(true|false|1|0)|` +
	`tail=(all|[0-9]{1,9})|(since|until)=[0-9]{1,10}(\.[0-9]{1,9})?)$`)

// serviceLogs answers GET /service/{id}/logs with what the service has printed and, if
// it is to follow, prints from now on. That ends in an orderly way only when the
// service's run does; whatever else ends it breaks the connection off.
func (s *server) serviceLogs(w http.ResponseWriter, r *http.Request) error {
	options, err := logsOptions(r.URL.RawQuery)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(s.serving, cancel)()
	opening := time.AfterFunc(s.waits.read, cancel)
	current, logs, err := s.openLogs(ctx, r.PathValue("id"), options)
	if err != nil {
		if !opening.Stop() {
			err = context.DeadlineExceeded
		}
		return err
	}
	opening.Stop()
	defer logs.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	out := flushing{w}
	out.Write(nil) // the header: the service may be silent for long
	if current.Config.Tty {
		_, err = io.Copy(out, logs)
	} else {
		_, err = stdcopy.StdCopy(out, out, logs)
	}
	if err != nil || !options.Follow {
		return err
	}
	now, err := s.lookup(ctx, r.PathValue("id"))
	if isA[*apiError](err) {
		return nil // deleted
	}
	if err == nil && now.isRun(current) {
		err = errors.New("the engine ended the logs of a service that runs")
	}
	return err
}

// openLogs returns the engine's answer, and the container that it is about.
func (s *server) openLogs(ctx context.Context, id string, options container.LogsOptions) (inspected, io.ReadCloser, error) {
	for try := 1; ; try++ {
		current, err := s.lookup(ctx, id)
		if err != nil {
			return current, nil, err
		}
		logs, err := s.engine.api().ContainerLogs(ctx, current.ID, options)
		if !errdefs.IsNotFound(err) || try == lookupTries { // else another container has just taken its place
			return current, logs, err
		}
	}
}

func logsOptions(rawQuery string) (o container.LogsOptions, err error) {
	query, err := url.ParseQuery(rawQuery)
	if err != nil {
		return o, badRequest("the query cannot be read")
	}
	for name, values := range query { // twice is none that can be right: "true,true"
		if parameter := name + "=" + strings.Join(values, ","); !logsParameter.MatchString(parameter) {
			return o, badRequest("%.100q: no such parameter, or not one of its values", parameter)
		}
	}
	on := func(name, otherwise string) bool {
		return slices.Contains([]string{"true", "1"}, cmp.Or(query.Get(name), otherwise))
	}
	return container.LogsOptions{Follow: on("follow", "false"), Timestamps: on("timestamps", "false"),
		ShowStdout: on("stdout", "true"), ShowStderr: on("stderr", "true"),
		Tail: query.Get("tail"), Since: query.Get("since"), Until: query.Get("until")}, nil
}

// serviceStdin answers POST /service/{id}/stdin when the service's stdin has taken all of
// the body. That may come in small parts, hours apart.
func (s *server) serviceStdin(w http.ResponseWriter, r *http.Request) error {
	ctl := http.NewResponseController(w)
	defer context.AfterFunc(s.serving, func() { ctl.SetReadDeadline(time.Now()) })()
	begin, err := s.lookup(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	if !begin.State.Running || !begin.Config.OpenStdin {
		return failure(http.StatusConflict, "the service does not run, or has no open stdin")
	}
	chunk := make([]byte, stdinChunk)
	for {
		n, readErr := r.Body.Read(chunk)
		if n > 0 {
			if err := s.writeStdin(r.Context(), r.PathValue("id"), begin, chunk[:n]); err != nil {
				return err
			}
		}
		switch {
		case readErr == io.EOF:
			return nil
		case errors.Is(readErr, os.ErrDeadlineExceeded):
			return failure(http.StatusServiceUnavailable, "the daemon ends")
		case readErr != nil:
			return badRequest("the body is incomplete")
		}
	}
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
	now, err := s.lookup(ctx, id)
	if err == nil && !now.isRun(begin) {
		err = failure(http.StatusConflict, "the service stopped before all was written")
	}
	if err != nil {
		return err
	}
	pipe, err := s.engine.attachStdin(ctx, begin.ID, detachKeys(chunk))
	if err != nil {
		return err
	}
	defer pipe.Close()
	defer context.AfterFunc(ctx, func() { pipe.Close() })()
	_, err = pipe.Write(chunk)
	err = cmp.Or(err, pipe.CloseWrite())
	_, endErr := io.Copy(io.Discard, pipe)
	if ctx.Err() != nil {
		return failure(http.StatusGatewayTimeout, "the service does not read its stdin")
	}
	return cmp.Or(err, endErr)
}

// detachKeys is what makes the engine break off a chunk for a tty: ctrl-p ctrl-q unless it
// is told otherwise. This cannot be foreseen, and does not begin as the chunk ends, where
// the engine would keep the beginning back.
func detachKeys(chunk []byte) string {
	keys := strings.Split("\xff"+rand.Text(), "")
	if chunk[len(chunk)-1] == '\xff' {
		keys[0] = "\xfe"
	}
	return strings.Join(keys, ",")
}

// resizeTTY answers POST /service/{id}/tty.
func (s *server) resizeTTY(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Rows uint16 `json:"rows"`
		Cols uint16 `json:"cols"`
	}
	if err := s.readJSON(w, r, &body); err != nil {
		return err
	}
	if body.Rows == 0 || body.Cols == 0 {
		return badRequest("rows and cols: must be 1 to 65535")
	}
	current, err := s.lookup(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	if !current.State.Running || !current.Config.Tty {
		return failure(http.StatusConflict, "the service does not run, or has no tty")
	}
	size := container.ResizeOptions{Height: uint(body.Rows), Width: uint(body.Cols)}
	return s.engine.api().ContainerResize(r.Context(), current.ID, size)
}
