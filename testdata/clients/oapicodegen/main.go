// Oapicodegen takes one service through its whole life, with the client that oapi-codegen makes of
// docs/openapi.json: oapicodegen URL KEY ARCHIVE ID, the third of a root file system with the program hello.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
	"os"
	"strings"
	"time"

	"clients/oapicodegen/api"
)

// want returns an answer if it has the status.
func want[T interface{ StatusCode() int }](status int) func(T, error) T {
	return func(answer T, err error) T {
		if err != nil {
			log.Fatal(err)
		}
		if answer.StatusCode() != status {
			log.Fatalf("the status is %d, not %d: %+v", answer.StatusCode(), status, answer)
		}
		return answer
	}
}

func ptr[T any](v T) *T { return &v }

func main() {
	ctx, id := context.Background(), os.Args[4]
	archive, err := os.ReadFile(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	c, err := api.NewClientWithResponses(os.Args[1], api.WithRequestEditorFn(func(_ context.Context, r *http.Request) error {
		r.Header.Set("X-Duxcore-CoreKey", os.Args[2])
		return nil
	}))
	if err != nil {
		log.Fatal(err)
	}
	want[*api.HealthResponse](204)(c.HealthWithResponse(ctx))
	want[*api.MachineResponse](200)(c.MachineWithResponse(ctx))
	image := want[*api.ImportImageResponse](201)(c.ImportImageWithBodyWithResponse(ctx, "application/x-tar", bytes.NewReader(archive))).JSON201
	fmt.Println(image.ImageId)
	var end api.HostMapEntries
	var signal api.StopSignal
	if err := errors.Join(end.FromHostMapEntry(api.HostMapEntry{HostPort: "0"}), signal.FromStopSignal1(15)); err != nil {
		log.Fatal(err)
	}
	create := api.CreateServiceJSONRequestBody{Type: api.Raw, Params: api.ServiceParams{Id: id, Image: image.ImageId, BindDir: "/data",
		Cmd: &[]string{"/hello"}, Env: &[]string{"GREETING=Hello"}, Tty: ptr(false), MaxRam: ptr(int64(64 << 20)),
		PortMap: &map[string]api.HostMapEntries{"80/tcp": end}, StopSignal: &signal}}
	want[*api.CreateServiceResponse](201)(c.CreateServiceWithResponse(ctx, nil, create))
	want[*api.RemoveImageResponse](409)(c.RemoveImageWithResponse(ctx, image.ImageId))
	want[*api.CreateServiceResponse](409)(c.CreateServiceWithResponse(ctx, nil, create))
	control := func(op api.ControlOp) {
		want[*api.ControlServiceResponse](204)(c.ControlServiceWithResponse(ctx, id, api.Control{Op: op}))
	}
	control(api.Start)
	if len(*want[*api.ListServicesResponse](200)(c.ListServicesWithResponse(ctx)).JSON200) != 1 {
		log.Fatal("the list has not one service")
	}
	if !want[*api.InspectServiceResponse](200)(c.InspectServiceWithResponse(ctx, id)).JSON200.State.Running {
		log.Fatal("it does not run")
	}
	want[*api.ServiceStatsResponse](200)(c.ServiceStatsWithResponse(ctx, id, nil))
	want[*api.ResizeServiceTTYResponse](409)(c.ResizeServiceTTYWithResponse(ctx, id, api.TTYSize{Rows: 24, Cols: 80}))
	want[*api.WriteServiceStdinResponse](204)(c.WriteServiceStdinWithBodyWithResponse(ctx, id, "text/plain", strings.NewReader("oapi-codegen\n")))
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		logs := want[*api.ServiceLogsResponse](200)(c.ServiceLogsWithResponse(ctx, id, &api.ServiceLogsParams{Tail: ptr("1")}))
		if string(logs.Body) == "Hello, oapi-codegen\n" {
			break
		}
		if time.Now().After(deadline) {
			log.Fatalf("the logs are %q", logs.Body)
		}
	}
	control(api.Stop)
	want[*api.SetServiceEnvResponse](204)(c.SetServiceEnvWithResponse(ctx, id, api.Env{"GREETING": "Good evening"}))
	control(api.Restart)
	control(api.Kill)
	want[*api.DeleteServiceResponse](204)(c.DeleteServiceWithResponse(ctx, id))
	gone := want[*api.InspectServiceResponse](404)(c.InspectServiceWithResponse(ctx, id)).JSON404
	if kind := gone.Error.Kind; kind != api.FailureKindNoSuchService {
		log.Fatalf("it is gone, and the error is of the kind %s", kind)
	}
	want[*api.ListImagesResponse](200)(c.ListImagesWithResponse(ctx))
	want[*api.RemoveImageResponse](204)(c.RemoveImageWithResponse(ctx, image.ImageId))
}
