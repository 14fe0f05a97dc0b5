package main

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/image"
)

// importName is the repository of imported images. Each has a tag of its own: the
// engine prunes an image without a name, and one name for all would leave the last one.
const importName = "duxcore/import"

// importImage answers POST /docker/image. The body passes through to the engine as it
// comes. The engine takes an empty or a cut-off body for an empty or smaller image, so
// the archive is followed on its way, and the engine's request is broken off before its
// end unless the archive was whole: the engine makes no image of such a request.
func (s *server) importImage(w http.ResponseWriter, r *http.Request) error {
	// Not the request's context: once the upload is complete, the image gets its tag.
	ctx, cancel := context.WithCancel(s.life)
	defer cancel()
	upload := newUpload(w, r.Body, cancel)
	defer upload.stall.Stop()

	body, sink := io.Pipe()
	followed := make(chan error, 1)
	go func() { // ends with the upload, or when body is closed
		err := followTar(io.TeeReader(upload, sink))
		if err == nil {
			upload.stall.Reset(s.createTimeout) // the engine may work on it for long
		}
		sink.CloseWithError(err)
		followed <- err
	}()
	id, err := s.importTar(ctx, body)
	body.CloseWithError(errEngineStopped)
	if uploadErr := <-followed; uploadErr != nil && !errors.Is(uploadErr, errEngineStopped) {
		return uploadErr
	}
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusCreated, map[string]string{"image_id": id})
	return nil
}

var errEngineStopped = errors.New("the engine reads no more")

// importTar makes an image of a tar stream and gives it its tag.
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
		_, removeErr := s.engine.api().ImageRemove(ctx, id, image.RemoveOptions{Force: true})
		return "", errors.Join(err, removeErr)
	}
	return id, nil
}

// upload reads a body that may take any time but not pause for long.
type upload struct {
	body  io.Reader
	ctl   *http.ResponseController
	stall *time.Timer // ends the engine's request when that, or the client, has paused for too long
}

func newUpload(w http.ResponseWriter, body io.Reader, cancel context.CancelFunc) *upload {
	return &upload{body, http.NewResponseController(w), time.AfterFunc(uploadStall, cancel)}
}

func (u *upload) Read(p []byte) (int, error) {
	u.ctl.SetReadDeadline(time.Now().Add(uploadStall))
	n, err := u.body.Read(p)
	u.stall.Reset(uploadStall)
	if err == io.EOF {
		u.ctl.SetReadDeadline(time.Time{}) // it would end the request's context later
	}
	return n, err
}

// followTar reads r to its end and returns nil if it is one whole tar archive, with an
// entry at least and with its end mark. Its errors are for the client.
func followTar(r io.Reader) error {
	end := &endNoticer{r: bufio.NewReaderSize(r, readChunk)}
	archive := tar.NewReader(end)
	entries := 0
	for {
		_, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return uploadError(err)
		}
		entries++
	}
	if entries == 0 || end.reached {
		return badRequest("the body is not a whole tar archive: it has no entry or no end mark")
	}
	if _, err := io.Copy(io.Discard, end); err != nil {
		return uploadError(err)
	}
	return nil
}

// endNoticer notes that its reader's end was reached: by a tar reader, which takes that
// for the archive's end, where the end mark of two zero blocks is missing.
type endNoticer struct {
	r       io.Reader
	reached bool
}

func (e *endNoticer) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	e.reached = e.reached || err == io.EOF
	return n, err
}

// uploadError says whose fault it is that an upload cannot be followed to its end.
func uploadError(err error) error {
	var tooMany *http.MaxBytesError
	if errors.As(err, &tooMany) || errors.Is(err, errEngineStopped) {
		return err
	}
	return badRequest("the body is not a whole tar archive: %v", err)
}

// ensureImage makes sure that the engine has the image, and pulls it if it does not.
// registryAuth is passed on to the engine as its X-Registry-Auth.
func (s *server) ensureImage(ctx context.Context, name, registryAuth string) error {
	_, err := s.engine.api().ImageInspect(ctx, name)
	if !errdefs.IsNotFound(err) {
		return err
	}
	if strings.HasPrefix(name, "sha256:") {
		return failure(http.StatusNotFound, "no image %q", name)
	}
	progress, err := s.engine.api().ImagePull(ctx, name, image.PullOptions{RegistryAuth: registryAuth})
	if err != nil {
		return fmt.Errorf("cannot pull the image: %w", err)
	}
	defer progress.Close()
	if _, err := lastStatus(progress); err != nil {
		return fmt.Errorf("cannot pull the image: %w", err)
	}
	return nil
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
			return "", failure(http.StatusBadGateway, "engine: %s", message.Error)
		}
		status = message.Status
	}
}
