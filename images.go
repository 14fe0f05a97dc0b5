package main

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/image"
)

// importName is the repository of imported images. Each has a tag of its own: the
// engine prunes an image without a name, and one name for all would leave the last one.
const importName = "duxcore/import"

const imageChunk = 256 << 10 // bytes of an upload that are passed on at a time

// importImage answers POST /docker/image. The body passes through to the engine as it
// comes. The engine takes an empty or a cut-off body for an empty or smaller image, so
// the archive is followed on its way, and the engine's request is broken off before its
// end unless the archive was whole: the engine makes no image of such a request.
func (s *server) importImage(w http.ResponseWriter, r *http.Request) error {
	// Not the request's context: once the upload is complete, the image gets its tag.
	ctx, cancel := context.WithCancel(s.life)
	defer cancel()
	ctl := http.NewResponseController(w)
	hang := time.AfterFunc(2*uploadStall, cancel)
	defer hang.Stop()
	body := &checkedTar{upload: upload{r.Body, ctl, hang, s.createTimeout}}
	id, err := s.importTar(ctx, body)
	late := ctx.Err() != nil
	cancel()
	if err != nil { // more of the upload is of no use; the deadline ends the connection's context
		ctl.SetReadDeadline(time.Now().Add(lingerTime))
	}
	// For good: nobody reads the upload any more.
	body.mu.Lock()
	if err != nil { // net/http sets it too, on the way, for a body that is too large
		w.Header().Set("Connection", "close")
	}
	if late {
		return failure(http.StatusGatewayTimeout, "the engine did not take the image in time")
	}
	if err == nil {
		writeJSON(w, http.StatusCreated, map[string]string{"image_id": id})
	}
	return err
}

// importTar makes an image of a tar stream and gives it its tag. An error of the stream
// is among the errors that it returns.
func (s *server) importTar(ctx context.Context, body io.Reader) (id string, err error) {
	answer, err := s.engine.api().ImageImport(ctx, image.ImportSource{Source: body, SourceName: "-"}, "", image.ImportOptions{})
	if err != nil {
		return "", err
	}
	defer answer.Close()
	if id, err = lastStatus(answer); err != nil {
		return "", err
	}
	hex, ok := strings.CutPrefix(id, "sha256:")
	if !ok || len(hex) != 64 {
		return "", failure(http.StatusBadGateway, "the engine did not say which image it imported")
	}
	if err := s.engine.api().ImageTag(ctx, id, importName+":"+hex[:12]); err != nil {
		undo, cancel := context.WithTimeout(s.life, s.waits.settle) // whatever became of ctx
		defer cancel()
		_, removeErr := s.engine.api().ImageRemove(undo, id, image.RemoveOptions{Force: true})
		return "", errors.Join(err, removeErr)
	}
	return id, nil
}

// upload reads a body that may take any time, but may not pause for long.
type upload struct {
	body       io.Reader
	ctl        *http.ResponseController
	hang       *time.Timer   // ends the engine's request if that reads nothing for long
	engineTime time.Duration // that it may take when it has read all
}

func (u *upload) Read(p []byte) (int, error) {
	u.ctl.SetReadDeadline(time.Now().Add(uploadStall))
	n, err := u.body.Read(p)
	u.hang.Reset(2 * uploadStall)
	if err == io.EOF {
		u.hang.Reset(u.engineTime)
		u.ctl.SetReadDeadline(time.Time{}) // it would end the request's context later
	}
	return n, err
}

// checkedTar is a body that net/http has write itself: each byte is copied once.
type checkedTar struct {
	upload upload
	mu     sync.Mutex // held while it is written, and from the request's end on
}

// Read makes checkedTar an io.Reader. Nobody calls it: the check has to see the end
// before the engine does.
func (t *checkedTar) Read([]byte) (int, error) { return 0, errors.ErrUnsupported }

// WriteTo passes the upload on. It fails unless that is one whole archive.
func (t *checkedTar) WriteTo(w io.Writer) (int64, error) {
	if !t.mu.TryLock() {
		return 0, errors.ErrUnsupported
	}
	defer t.mu.Unlock()
	return 0, followTar(io.TeeReader(&t.upload, w))
}

// followTar reads r to its end. It returns nil if that was one whole tar archive, with
// an entry at least and with its end mark, and else an error for the client.
func followTar(r io.Reader) error {
	stream := &limitedReader{r: bufio.NewReaderSize(r, imageChunk), left: math.MaxInt64}
	archive := tar.NewReader(stream)
	_, err := archive.Next()
	if err == io.EOF {
		return badRequest("the body is not a tar archive: it has no entry")
	}
	for err == nil {
		_, err = archive.Next()
	}
	if err == io.EOF {
		err = stream.drain()
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return badRequest("the body came too slowly")
	case err == nil, isA[*http.MaxBytesError](err), isA[*net.OpError](err): // the last: the engine reads no more
		return err
	}
	return badRequest("the body is not a whole tar archive: %s", plain(err))
}

// ensureImage makes sure that the engine has the image, and pulls it if it does not.
// registryAuth is passed on to the engine as its X-Registry-Auth.
func (s *server) ensureImage(ctx context.Context, name, registryAuth string) error {
	_, err := s.engine.api().ImageInspect(ctx, name)
	if !errdefs.IsNotFound(err) {
		return err
	}
	if imageID.MatchString(name) { // no registry knows it
		return noSuchImage(name)
	}
	progress, err := s.engine.api().ImagePull(ctx, name, image.PullOptions{RegistryAuth: registryAuth})
	if errdefs.IsNotFound(err) {
		_, text := s.describe(err)
		return failure(http.StatusNotFound, "cannot pull the image: %s", text)
	}
	if err != nil {
		return fmt.Errorf("cannot pull the image: %w", err)
	}
	defer progress.Close()
	_, err = lastStatus(progress)
	return err
}

// lastStatus reads the engine's progress messages to their end and returns the last
// one's status. A failure comes as a message too, in an answer that began with 200.
func lastStatus(progress io.Reader) (status string, err error) {
	decoder := json.NewDecoder(progress)
	for {
		var message struct {
			Status string `json:"status"`
			Error  string `json:"error"`
		}
		if err := decoder.Decode(&message); err == io.EOF {
			return status, nil
		} else if err != nil {
			return "", err
		}
		if message.Error != "" {
			return "", errors.New("engine: " + message.Error)
		}
		status = message.Status
	}
}
